"""Faults under a real QEMU: the VM goes on at the source, and the next migration succeeds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from labkit import KIB, MIB, dirtying, until, wait_back_at_source
from test_lab_failures import finish

from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.vm.qtest_guest import QtestGuest
from vfu_dev.vm.servers import DeviceServer

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# Nobody writes while a migration fails: qtest's writer is no vCPU, which stops and goes on with the VM.
IDLE = dirtying(0)
# QEMU waits for a reply for 5 s, if it is told nothing else; this fault lasts for longer than that.
SILENT = "op=mig-read,stall,state=PRE_COPY,count=1"
# Fault, which side has it, words of QEMU's reason at the source (empty: it need not know one).
FAULTS = [
    ("op=mig-read,error=ENOSPC,state=PRE_COPY", "source", "No space left on device"),
    ("op=mig-read,error=ENOSPC,state=STOP_COPY", "source", "No space left on device"),
    (SILENT, "source", "timed out"),
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
        release = asyncio.create_task(release_when_given_up(lab, server)) if fault == SILENT else None
        reply = await lab.migrate()
        assert reply["status"] == "failed", reply
        if release is not None:
            await release
        assert says.lower() in str(reply.get("error-desc")).lower()
        found = await server.command("faults")
        assert sum(found["injected"].values()) > 0, found
        await server.command("fault", clear="all")
        for qemu in (lab.source.qemu, lab.destination.qemu):
            assert qemu.process.status is None or qemu.process.status >= 0, "ended by a signal"
        await wait_back_at_source(lab)
        status = await source.status()
        assert (status["counters"]["resets"] > resets) == (fault == RESETS)
        if fault == RESETS:
            for device in guest.devices:
                device.scratch = 0  # registers do not survive a reset; memory does
        await guest.write_pages(32, dirtying(MIB, "sequential"))  # and reads back
        await lab.replace_destination()
        reply = await lab.migrate()
        assert reply["status"] == "completed", reply
        return await finish(lab, MigrationResult())

    impatient = {"qemu_extra": ()} if fault == SILENT else {}
    result = in_lab(options(load=IDLE, memory_bytes=256 * KIB, **impatient), scenario)
    assert result.problems == []


async def release_when_given_up(lab: Lab, server: DeviceServer) -> None:
    """Clear a fault that holds a reply up as soon as the source's QEMU does not wait for it any more."""

    async def given_up() -> bool:
        return "timed out waiting for reply" in lab.source.qemu.process.log.read_text()

    await until(given_up, "QEMU gives up")
    await server.command("fault", clear="all")


@pytest.mark.parametrize("ack", [False, True])
def test_switchover_ack_takes_the_destinations_time_out_of_the_downtime(
    options: Options, in_lab: InLab, ack: bool
) -> None:
    """A destination that takes its time for the initial data: with the VM stopped, or before it stops.

    It takes as long as the test wants. Without switchover-ack QEMU stops the VM with initial data left; with
    it, only when the destination is through, although all of it would fit into the downtime.
    """

    async def scenario(lab: Lab) -> MigrationResult:
        source, destination = lab.source.qemu, lab.destination.servers[0]
        await lab.configure()
        await lab.begin(await lab.listen())
        await until(lambda: is_held(destination), "initial data has arrived")
        assert (await source.run_state() == "running") == ack
        released = time.time()
        await destination.command("fault", clear="all")
        assert (await lab.wait_final())["status"] == "completed"
        stopped = (await source.wait_event("STOP"))["time"]
        resumed = (await lab.destination.qemu.wait_event("RESUME"))["time"]
        assert (released < stopped) == ack
        assert released < resumed
        result = await finish(lab, MigrationResult(), pre_copy=ack or None)
        if not ack:
            assert result.qemu.downtime_ms is not None
            assert result.qemu.downtime_ms >= (released - stopped) * 1000 - 1
        return result

    # The threshold is 2 GiB, of 1 GiB/s and 2 s: QEMU stops once it has measured, with initial data left.
    generous = {
        "memory_bytes": 2 * MIB,
        "load": dirtying(64 * KIB),
        "max_bandwidth": 2 * MIB,
        "switchover_bandwidth": 1 << 30,
        "downtime_limit_ms": 2000,
    }
    fault = "op=mig-write,stall,when=initial-received"
    result = in_lab(options(**generous, switchover_ack=ack, faults_destination=(fault,)), scenario)
    assert result.problems == []


async def is_held(server: DeviceServer) -> bool:
    """Whether the server's one fault has happened; it has not been cleared."""
    (armed,) = (await server.command("faults"))["armed"]
    return int(armed["hits"]) == 1


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
                resumed = (await lab.destination.servers[0].status())["resume"]
                assert resumed["digest"] == (await server.status())["save"]["digest"]
                await lab.turn_around()
            else:
                # All is sent, and as it goes by what it is told, it goes on.
                await lab.wait_for(all_sent, f"everything sent: {fault}")
                done = await server.command("faults")
                again = done["armed"][0]["hits"] + 20
                while (await server.command("faults"))["armed"][0]["hits"] < again:
                    assert (await lab.source.qemu.migration())["status"] == "active"
                await lab.give_up()
                await wait_back_at_source(lab)
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
