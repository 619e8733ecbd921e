"""Migrations cancelled, refused or robbed of a server: no abort, no hang, a clear error, a live guest."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, dirtying

from vfu_dev.errors import LabError
from vfu_dev.lab.judge import judge
from vfu_dev.lab.migrate import Lab, MigrateOptions
from vfu_dev.lab.qtest_guest import QtestGuest
from vfu_dev.lab.result import MigrationResult
from vfu_dev.report.page import render

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# Slow enough that a 2 MiB device is half sent for about a second: QEMU reads it in blocks of 1 MiB.
SLOW: dict[str, Any] = {"memory_bytes": 2 * MIB, "max_bandwidth": MIB, "load": dirtying(128 * KIB)}


async def begin_and_wait_half(lab: Lab) -> None:
    """Start the migration and wait until part of the initial data, not all, was sent."""
    await lab.configure()
    await lab.begin(await lab.listen())
    await lab.wait_for(half_sent, "half of the initial data", 20.0)


def half_sent(row: dict[str, Any]) -> bool:
    """Whether the first device is in PRE_COPY, with some of its initial data sent."""
    device = row["source"][0]
    return (
        device.get("state") == "PRE_COPY"
        and bool(device.get("precopy_bytes"))
        and bool(device.get("initial_bytes"))
    )


async def faster(lab: Lab) -> None:
    """Let a slowed migration run."""
    await lab.source.qemu.execute("migrate-set-parameters", max_bandwidth=64 * MIB)


async def finish(lab: Lab, result: MigrationResult) -> MigrationResult:
    """After a completed migration: follow the guest, verify, collect, judge."""
    await lab.wait_running(lab.destination.qemu)
    await lab.guest.follow(lab.destination.qemu)
    await lab.guest.stop()
    result.guest = await lab.guest.verify()
    await lab.collect(result)
    judge(result, lab.options.pre_copy)
    return result


async def failed_report(lab: Lab) -> tuple[MigrationResult, str]:
    """Return result and page of a migration that failed; they name QEMU's error, not what follows from it."""
    result = MigrationResult(command=["vfu-dev", "lab", "migrate"])
    await lab.collect(result)
    judge(result, lab.options.pre_copy)
    assert result.status == "failed"
    assert any(text.startswith("QEMU says 'failed'") for text in result.problems)
    assert not any("digests" in text for text in result.problems)
    page = render(result.to_json())
    assert "<title>vfu-dev: migration failed" in page
    assert "The state did not move" in page
    return result, page


async def source_still_works(lab: Lab) -> None:
    """The VM runs on the source and the device holds everything the guest wrote, new writes included."""
    await lab.wait_running(lab.source.qemu)
    guest = lab.guest
    await guest.follow(lab.source.qemu)
    await asyncio.sleep(0.2)
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
        reply = await lab.wait_final()
        assert reply["status"] == "cancelled"
        status = await lab.source.servers[0].status()
        assert status["state"] == "RUNNING"
        assert status["save"]["status"] == "aborted"
        assert await lab.source.qemu.run_state() == "running"
        await lab.replace_destination()
        await lab.configure()
        await lab.begin(await lab.listen())
        await lab.wait_for(half_sent, "the second try's initial data", 20.0)
        await faster(lab)
        assert (await lab.wait_final())["status"] == "completed"
        return await finish(lab, MigrationResult())

    result = in_lab(options(**SLOW), scenario)
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
        load = (await lab.destination.servers[0].status())["load"]
        assert load["status"] in ("failed", "aborted")
        assert str(MIB) in load["error"]
        assert str(MIB // 2) in load["error"]
        await source_still_works(lab)

    in_lab(options(), scenario)


def test_source_server_killed_in_precopy(options: Options, in_lab: InLab) -> None:
    """QEMU survives the death of its device's server: the migration fails, the VM and its monitor do not."""

    async def scenario(lab: Lab) -> dict[str, Any]:
        await begin_and_wait_half(lab)
        await lab.source.servers[0].kill()
        await faster(lab)
        reply = await lab.wait_final(20.0)
        assert reply["status"] == "failed"
        assert await lab.source.qemu.run_state() in ("running", "postmigrate", "paused")
        assert isinstance(lab.guest, QtestGuest)
        await lab.guest.stop()
        # The dead device reads as all ones, as a removed PCI device does, or as zeros; nothing aborts.
        assert lab.guest.client is not None
        await lab.guest.client.read(4, lab.guest.devices[0].bar0)
        assert lab.source.qemu.process.running
        assert lab.destination.qemu.process.status in (None, 0, 1)
        result, page = await failed_report(lab)
        assert "vfu0: source gone" in page
        assert any("source-vfu0" in text for text in result.problems)
        return reply

    reply = in_lab(options(**SLOW), scenario)
    assert reply.get("error-desc")


def test_destination_server_killed_in_precopy(options: Options, in_lab: InLab) -> None:
    """The destination gives up with an error, never by a signal; the source goes on with guest and device."""

    async def scenario(lab: Lab) -> None:
        await begin_and_wait_half(lab)
        await lab.destination.servers[0].kill()
        await faster(lab)
        reply = await lab.wait_final(20.0)
        assert reply["status"] == "failed"
        status = lab.destination.qemu.process.status
        assert status is None or status >= 0, f"destination QEMU ended by signal {-status}"
        await source_still_works(lab)
        _, page = await failed_report(lab)
        assert "The VM on the source is <b>running</b>" in page
        assert "vfu0: source RUNNING, destination gone" in page

    in_lab(options(**SLOW), scenario)


def test_device_reset_in_precopy_goes_on(options: Options, in_lab: InLab) -> None:
    """A machine reset by the user during PRE_COPY resets the device's registers, not its migration."""

    async def scenario(lab: Lab) -> MigrationResult:
        await begin_and_wait_half(lab)
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
        await faster(lab)
        reply = await lab.wait_final()
        assert reply["status"] == "completed", reply.get("error-desc")
        return await finish(lab, MigrationResult())

    result = in_lab(options(**SLOW), scenario)
    assert result.problems == []


def test_to_a_file_and_back(options: Options, in_lab: InLab, tmp_path: Path) -> None:
    """`migrate` to a file, then `migrate-incoming` from it, in a QEMU with fresh servers."""

    async def scenario(lab: Lab) -> MigrationResult:
        uri = f"file:{tmp_path / 'vm.state'}"
        await lab.configure(return_path=False)
        await lab.begin(uri)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.destination.qemu.execute("migrate-incoming", uri=uri)
        return await finish(lab, MigrationResult())

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
        with pytest.raises(LabError):
            await lab.wait_running(qemu, 5.0)
        assert qemu.process.status is None or qemu.process.status >= 0
        if qemu.process.running:
            assert (await qemu.migration())["status"] == "failed"

    in_lab(options(), scenario)
