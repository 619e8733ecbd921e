"""Migrations cancelled or refused: no abort, no hang, a clear error, a live guest.

What is left when a process dies: test_crash_matrix.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import labkit
from labkit import CANCELLED, KIB, MIB, begin_and_stay, dirtying, until, wait_back_at_source
from versionkit import OURS, Evidence, Row, shows

from vfu_dev.errors import LabError
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import FINAL_STATES, MigrationResult
from vfu_dev.vm.qtest_guest import QtestGuest

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# A device of 2 MiB that QEMU reads in blocks of 1 MiB: the second one is held until the fault is cleared.
# Nobody writes meanwhile, because a guest's accesses would be held too.
HOLD = "op=mig-read,stall,state=PRE_COPY,after=1,count=1"
HALF: dict[str, Any] = {
    "memory_bytes": 2 * MIB,
    "max_bandwidth": 64 * MIB,
    "load": dirtying(0),
    "faults_source": (HOLD,),
}
LOAD = dirtying(128 * KIB)


async def begin_and_wait_half(lab: Lab) -> None:
    """Start the migration and wait until part of the initial data, not all, was sent; `let_go` ends that."""
    await lab.configure()
    await lab.begin(await lab.listen())

    async def held() -> bool:
        (armed,) = (await lab.source.servers[0].command("faults"))["armed"]
        return int(armed["hits"]) == 1

    await until(held, "half of the initial data")
    (device,) = (await lab.sample())["source"]
    assert device["state"] == "PRE_COPY"
    assert MIB <= device["precopy_bytes"] < 2 * MIB


async def let_go(lab: Lab) -> None:
    """Let the device send the other half."""
    await lab.source.servers[0].command("fault", clear="all")


async def finish(lab: Lab, result: MigrationResult, pre_copy: bool | None = True) -> MigrationResult:
    """After a completed migration: follow the guest, verify, collect, judge."""
    await lab.wait_running(lab.destination.qemu)
    await lab.guest.follow(lab.destination.qemu)
    await lab.guest.stop()
    result.guest = await lab.guest.verify()
    await lab.collect(result)
    judge(result, pre_copy)
    return result


async def source_still_works(lab: Lab) -> None:
    """The VM runs on the source and the device holds everything the guest wrote, new writes included."""
    await wait_back_at_source(lab)
    guest = lab.guest
    await guest.follow(lab.source.qemu)
    await guest.start(LOAD)
    written = lab.source.servers[0]
    before = (await written.status())["counters"]["region_writes"]
    while (await written.status())["counters"]["region_writes"] <= before:
        await asyncio.sleep(0.01)
    await guest.stop()
    found = await guest.verify()
    assert found.mismatched_bytes == 0
    assert found.readback_errors == 0
    assert (await lab.source.servers[0].status())["state"] == "RUNNING"


def test_cancelled_half_way_then_second_try_succeeds(options: Options, in_lab: InLab) -> None:
    """Cancelling returns the device to RUNNING on the source; the next migration starts from nothing."""

    async def scenario(lab: Lab) -> MigrationResult:
        await begin_and_wait_half(lab)
        await lab.source.qemu.execute("migrate_cancel")
        await let_go(lab)
        reply = await lab.wait_final()
        assert reply["status"] in CANCELLED
        await wait_back_at_source(lab)
        status = await lab.source.servers[0].status()
        assert status["save"]["status"] == "aborted"
        assert await lab.source.qemu.run_state() == "running"
        await lab.replace_destination()
        await lab.guest.start(LOAD)
        assert (await lab.migrate())["status"] == "completed"
        return await finish(lab, MigrationResult())

    result = in_lab(options(**HALF), scenario)
    assert result.problems == []
    assert result.qemu.states_source.count("PRE_COPY") == 2


def test_destination_of_another_size_refuses(options: Options, in_lab: InLab) -> None:
    """A destination with another memory size refuses in words, early, and the source goes on."""

    async def scenario(lab: Lab) -> None:
        await lab.replace_destination(dataclasses.replace(lab.options, memory_bytes=MIB // 2))
        await lab.configure()
        await lab.begin(await lab.listen())
        reply = await lab.wait_final()
        assert reply["status"] == "failed"
        load = (await lab.destination.servers[0].status())["resume"]
        assert load["status"] in ("failed", "aborted")
        assert str(MIB) in load["error"]
        assert str(MIB // 2) in load["error"]
        await source_still_works(lab)

    in_lab(options(), scenario)


def test_device_reset_in_precopy_goes_on(options: Options, in_lab: InLab) -> None:
    """A machine reset by the user during PRE_COPY resets the device's registers, not its migration."""

    async def scenario(lab: Lab) -> MigrationResult:
        await begin_and_stay(lab)
        guest = lab.guest
        assert isinstance(guest, QtestGuest)
        await guest.stop()
        before = (await lab.source.servers[0].status())["counters"]["resets"]
        await lab.source.qemu.execute("system_reset")
        await lab.source.qemu.wait_event("RESET")
        status = await lab.source.servers[0].status()
        assert status["counters"]["resets"] > before
        assert status["state"] == "PRE_COPY"
        await guest.program_bars()
        for device in guest.devices:
            device.scratch = 0  # registers do not survive a reset
        await labkit.let_go(lab)
        reply = await lab.wait_final()
        assert reply["status"] == "completed", reply.get("error-desc")
        return await finish(lab, MigrationResult())

    result = in_lab(options(memory_bytes=2 * MIB, max_bandwidth=64 * MIB, load=LOAD), scenario)
    assert result.problems == []


@shows(Row(OURS, "vfio-user-pci"), "PRE_COPY", "file")
def test_to_a_file_and_back(options: Options, in_lab: InLab, evidence: Evidence, tmp_path: Path) -> None:
    """`migrate` to a file, then `migrate-incoming` from it, in a QEMU with fresh servers."""

    async def scenario(lab: Lab) -> MigrationResult:
        uri = f"file:{tmp_path / 'vm.state'}"
        await lab.configure(return_path=False)
        await lab.begin(uri)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.destination.qemu.execute("migrate-incoming", uri=uri)
        result = await finish(lab, MigrationResult())
        evidence.of_move(lab, result, tmp_path / "vm.state")
        return result

    result = in_lab(options(), scenario)
    assert result.problems == []


def test_truncated_file_is_refused(options: Options, in_lab: InLab, tmp_path: Path) -> None:
    """A state file that ends early is never run: the destination says so and its VM does not start."""

    async def scenario(lab: Lab) -> None:
        path = tmp_path / "vm.state"
        await lab.configure(return_path=False)
        await lab.begin(f"file:{path}")
        assert (await lab.wait_final())["status"] == "completed"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 600 * KIB)
        qemu = lab.destination.qemu
        await qemu.execute("migrate-incoming", uri=f"file:{path}")
        with contextlib.suppress(LabError):  # it may end instead
            while (await qemu.migration())["status"] not in FINAL_STATES:
                await asyncio.sleep(0.01)
            assert (await qemu.migration())["status"] == "failed"
            assert await qemu.run_state() != "running"
        assert qemu.process.status is None or qemu.process.status >= 0

    in_lab(options(), scenario)
