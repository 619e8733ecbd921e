"""What unmodified QEMUs make of a device that refuses or lies: docs/faults.md, "QEMU by version"."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from itinerary import QEMUS
from labkit import CANCELLED, KIB, MIB, dirtying, small, until, wait_back_at_source, wait_moved

from vfu_dev.builds.qemu_binary import find_qemu
from vfu_dev.errors import BuildError
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.vm.guest import LinuxGuest
from vfu_dev.vm.qtest_device import PCI_COMMAND, PCI_COMMAND_MASTER
from vfu_dev.vm.qtest_guest import QtestGuest

InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def stock(library: Path, guest_image: Path, preload: Path) -> Callable[..., MigrateOptions]:
    """Make options for an unmodified QEMU, with a guest where it has no qtest; nobody writes."""

    def make(version: str, **changes: Any) -> MigrateOptions:
        try:
            qemu = find_qemu(QEMUS[version])
        except BuildError as error:
            pytest.skip(str(error))
        if not qemu.qtest:
            changes |= {"guest_image": guest_image, "max_bandwidth": 64 * MIB}
        values = {"memory_bytes": 256 * KIB, "load": dirtying(0), "warmup_seconds": 0.0, "qemu_extra": ()}
        return small(qemu.path, library, **{"front_end": "vfio-pci", **values, **changes})

    return make


async def is_bus_master(lab: Lab) -> bool:
    """Whether the device may do DMA, as its driver set it up."""
    if isinstance(lab.guest, LinuxGuest):
        command = (await lab.guest.command(f"config offset={PCI_COMMAND} size=2"))["value"]
    else:
        assert isinstance(lab.guest, QtestGuest)
        assert lab.guest.client is not None
        command = await lab.guest.client.config_read(lab.guest.devices[0].slot, PCI_COMMAND)
    return bool(command & PCI_COMMAND_MASTER)


async def wait_said(log: Path, text: str, since: int) -> None:
    """Wait until a log has `text` behind its first `since` characters."""

    async def said() -> bool:
        return text in log.read_text()[since:]

    await until(said, text)


@pytest.mark.parametrize("version", ["10.0", "10.2", "11.1"])
def test_a_device_that_refuses_a_state_is_reset(
    version: str, stock: Callable[..., MigrateOptions], in_lab: InLab
) -> None:
    """At the source the migration fails. At the destination it completes, and the VM lacks its state."""

    async def scenario(lab: Lab) -> None:
        source = lab.source.servers[0]
        resets = (await source.status())["counters"]["resets"]
        if isinstance(lab.guest, LinuxGuest):
            await lab.guest.command("irq mode=msix")  # its driver enables the device
        assert await is_bus_master(lab)
        await source.command("fault", fault="op=transition,error=EBUSY,to=STOP_COPY")
        reply = await lab.migrate()
        assert reply["status"] == "failed"
        said = "Failed setting device state to STOP_COPY. Recover state is ERROR. Resetting device"
        assert said in reply["error-desc"]
        await lab.wait_running(lab.source.qemu)
        status = await source.status()
        assert (status["state"], status["counters"]["resets"]) == ("RUNNING", resets + 1)
        assert not await is_bus_master(lab)
        await source.command("fault", clear="all")

        await lab.replace_destination()
        destination = lab.destination.servers[0]
        resets = (await destination.status())["counters"]["resets"]
        await destination.command("fault", fault="op=transition,error=EBUSY,arc=RESUMING->STOP")
        assert (await lab.migrate())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        await wait_moved(lab.source.qemu)
        status = await destination.status()
        assert (status["state"], status["counters"]["resets"]) == ("RUNNING", resets + 1)
        assert status["resume"]["status"] != "completed"
        said = "Failed setting device state to RUNNING_P2P. Recover state is ERROR. Resetting device"
        assert said in lab.destination.qemu.process.log.read_text()
        # QEMU does not notice; the lab does.
        result = MigrationResult()
        await lab.collect(result)
        judge(result, pre_copy=None, verified=False)
        assert any("resume session did not complete" in problem for problem in result.problems)

    in_lab(stock(version), scenario)


# Fault; how the migration ends in each version, `active`: it does not; what 11.1 says on stderr.
OVERFLOW = "size overflow: 0xffffffffffffffff"
LIES = [
    ("op=precopy-info,lie=huge", {"10.0": "completed", "10.2": "completed", "11.1": "active"}, OVERFLOW),
    ("op=precopy-info,error=EIO", dict.fromkeys(("10.0", "10.2", "11.1"), "completed"), "failed (-5)"),
    ("op=data-size,lie=zero", dict.fromkeys(("10.0", "10.2", "11.1"), "failed"), ""),
    ("op=data-size,lie=200G", dict.fromkeys(("10.0", "10.2", "11.1"), "active"), ""),
    ("op=data-size,error=EIO", dict.fromkeys(("10.0", "10.2", "11.1"), "active"), "failed (-5)"),
]


@pytest.mark.parametrize(
    "version",
    ["11.1", pytest.param("10.2", marks=pytest.mark.soak), pytest.param("10.0", marks=pytest.mark.soak)],
)
def test_sizes_that_lie_or_fail(version: str, stock: Callable[..., MigrateOptions], in_lab: InLab) -> None:
    """It completes, refuses to begin, or goes on until it is cancelled; 11.1 says why."""

    async def scenario(lab: Lab) -> None:
        for fault, outcomes, says in LIES:
            server, before = lab.source.servers[0], len(lab.source.qemu.process.log.read_text())
            await server.command("fault", fault=fault)
            await lab.configure()
            await lab.begin(await lab.listen())
            if outcomes[version] == "active":
                while (await server.command("faults"))["armed"][0]["hits"] < 20:
                    assert (await lab.source.qemu.migration())["status"] in ("setup", "active"), fault
                await lab.give_up()
            ends = CANCELLED if outcomes[version] == "active" else (outcomes[version],)
            assert (await lab.wait_final())["status"] in ends, fault
            said = lab.source.qemu.process.log.read_text()[before:]
            assert (says in said) if version == "11.1" else "overflow" not in said, (fault, said)
            if outcomes[version] == "completed":
                await lab.wait_running(lab.destination.qemu)
                await lab.guest.follow(lab.destination.qemu)
                resumed = (await lab.destination.servers[0].status())["resume"]
                assert resumed["digest"] == (await server.status())["save"]["digest"], fault
                await lab.turn_around(keep_logs=True)
                continue
            if outcomes[version] == "failed":
                # QEMU says "failed" before it prints the reason.
                log = lab.source.qemu.process.log
                await wait_said(log, "Failed to allocate migration data buffer", before)
            await wait_back_at_source(lab)
            await server.command("fault", clear="all")
            await lab.replace_destination()

    # Slow: of what is all read before it has a threshold, QEMU does not ask the length.
    slow = {"max_bandwidth": 128 * KIB} if version != "10.0" else {"memory_bytes": 32 * MIB}
    in_lab(stock(version, **slow), scenario)
