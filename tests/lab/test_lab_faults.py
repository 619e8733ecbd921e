"""Faults under a real QEMU: the VM goes on at the source, and the next migration succeeds."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from labkit import KIB, MIB, dirtying
from test_lab_failures import finish

from vfu_dev.lab.migrate import Lab, MigrateOptions
from vfu_dev.lab.qtest_guest import QtestGuest
from vfu_dev.lab.result import MigrationResult

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# Nobody writes while a migration fails: qtest's writer is no vCPU, which stops and goes on with the VM.
IDLE = dirtying(0)
# Fault, which side has it, words of QEMU's reason at the source (empty: it need not know one).
FAULTS = [
    ("op=mig-read,error=ENOSPC,state=PRE_COPY", "source", "No space left on device"),
    ("op=mig-read,error=ENOSPC,state=STOP_COPY", "source", "No space left on device"),
    ("op=mig-read,delay=6,force=yes,state=PRE_COPY,count=1", "source", "timed out"),
    ("op=transition,error=EBUSY,to=STOP_COPY", "source", ""),
    ("op=transition,error=EBUSY,arc=RESUMING->STOP", "destination", ""),
    ("op=mig-read,corrupt=100000", "source", ""),
    ("op=mig-read,truncate,state=STOP_COPY", "source", ""),
    ("op=mig-write,error=ENOSPC", "destination", ""),
    ("op=mig-write,disconnect", "destination", ""),
]
# QEMU's last resort, when a device can be taken neither to a state nor back, is to reset it.
RESETS = "op=transition,error=EBUSY,to=STOP_COPY"


@pytest.mark.parametrize(("fault", "side", "says"), FAULTS, ids=[f"{case[1]}:{case[0]}" for case in FAULTS])
def test_the_vm_survives_a_fault_and_moves_at_the_second_try(
    options: Options, in_lab: InLab, fault: str, side: str, says: str
) -> None:
    """The migration fails, the guest keeps its device and everything it wrote, and can be moved then."""

    async def scenario(lab: Lab) -> MigrationResult:
        guest = lab.guest
        assert isinstance(guest, QtestGuest)
        await guest.write_pages(32, dirtying(MIB))
        server, source = getattr(lab, side).servers[0], lab.source.servers[0]
        resets = (await source.status())["counters"]["resets"]
        await server.command("fault", fault=fault)
        reply = await lab.migrate()
        assert reply["status"] == "failed", reply
        assert says.lower() in str(reply.get("error-desc")).lower()
        found = await server.command("faults")
        assert sum(found["injected"].values()) > 0, found
        await server.command("fault", clear="all")
        for qemu in (lab.source.qemu, lab.destination.qemu):
            assert qemu.process.status is None or qemu.process.status >= 0, "ended by a signal"
        await lab.wait_running(lab.source.qemu)
        status = await source.status()
        assert status["state"] == "RUNNING"
        assert (status["counters"]["resets"] > resets) == (fault == RESETS)
        if fault == RESETS:
            for device in guest.devices:
                device.scratch = 0  # registers do not survive a reset; memory does
        await guest.write_pages(32, dirtying(MIB, "sequential"))  # and reads back
        await lab.replace_destination()
        reply = await lab.migrate()
        assert reply["status"] == "completed", reply
        return await finish(lab, MigrationResult())

    result = in_lab(options(load=IDLE, memory_bytes=256 * KIB), scenario)
    assert result.problems == []


@pytest.mark.parametrize("ack", [False, True])
def test_switchover_ack_takes_the_destinations_time_out_of_the_downtime(
    options: Options, in_lab: InLab, ack: bool
) -> None:
    """The destination takes 1.5 s when initial data has arrived: with the VM stopped, or before it stops."""

    async def scenario(lab: Lab) -> MigrationResult:
        reply = await lab.migrate()
        assert reply["status"] == "completed", reply
        found = await lab.destination.servers[0].command("faults")
        assert found["armed"][0]["hits"] == 1
        return await finish(lab, MigrationResult())

    # All of the device fits under the threshold (32 MiB/s for 300 ms), as on a fast network.
    fast = {
        "memory_bytes": 512 * KIB,
        "load": dirtying(64 * KIB),
        "max_bandwidth": 64 * MIB,
        "switchover_bandwidth": 32 * MIB,
        "downtime_limit_ms": 300,
    }
    fault = "op=mig-write,delay=1.5,when=initial-loaded"
    result = in_lab(options(**fast, switchover_ack=ack, faults_destination=(fault,)), scenario)
    assert result.problems == []
    assert result.qemu.downtime_ms is not None
    if ack:
        assert result.qemu.downtime_ms < 1000
        assert result.qemu.total_ms is not None
        assert result.qemu.total_ms >= 1500
    else:
        assert result.qemu.downtime_ms >= 1500


# What a device says about its size; whether QEMU stops it all the same. An empty read sets right whatever
# pre-copy info said; the length of STOP_COPY is what QEMU decides by.
LIES = [
    ("op=precopy-info,lie=zero", True),
    ("op=precopy-info,lie=huge", True),
    ("op=data-size,lie=zero", True),
    ("op=data-size,lie=200G", False),
]


def test_sizes_that_lie_end_in_a_clear_state(options: Options, in_lab: InLab) -> None:
    """QEMU completes, or goes on for ever; then cancelling leads back, and the VM can be moved."""

    async def scenario(lab: Lab) -> MigrationResult:
        guest = lab.guest
        assert isinstance(guest, QtestGuest)
        await guest.write_pages(32, dirtying(MIB))
        for fault, completes in LIES:
            server = lab.source.servers[0]
            await server.command("fault", fault=fault)
            await lab.configure()
            await lab.begin(await lab.listen())
            if completes:
                assert (await lab.wait_final())["status"] == "completed", fault
                await lab.wait_running(lab.destination.qemu)
                await guest.follow(lab.destination.qemu)
                loaded = (await lab.destination.servers[0].status())["load"]
                assert loaded["digest"] == (await server.status())["save"]["digest"]
                await lab.turn_around()
            else:
                # All is sent, and as it goes by what it is told, it goes on.
                await lab.wait_for(all_sent, f"everything sent: {fault}", 20.0)
                done = await server.command("faults")
                again = done["armed"][0]["hits"] + 20
                while (await server.command("faults"))["armed"][0]["hits"] < again:
                    assert (await lab.source.qemu.migration())["status"] == "active"
                await lab.give_up()
                await lab.wait_running(lab.source.qemu)
                assert (await server.status())["state"] == "RUNNING"
                await server.command("fault", clear="all")
                await lab.replace_destination()
        assert (await lab.migrate())["status"] == "completed"
        return await finish(lab, MigrationResult())

    # Slow: of what is all read in its first 0.1 s, before it has a threshold, QEMU does not ask the length.
    result = in_lab(options(load=IDLE, memory_bytes=256 * KIB, max_bandwidth=128 * KIB), scenario)
    assert result.problems == []


def all_sent(row: dict[str, Any]) -> bool:
    """Whether the first device's whole memory was read in PRE_COPY."""
    device = row["source"][0]
    return device.get("state") == "PRE_COPY" and (device.get("precopy_bytes") or 0) >= 256 * KIB
