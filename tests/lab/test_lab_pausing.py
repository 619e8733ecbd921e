"""Migrations that pause before the switchover, as libvirt's do: gone on with, and given up there."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, dirtying
from serverkit import VFU_DEV

from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.migrate import run
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.pausing import CAPABILITY, PAUSED
from vfu_dev.lab.result import MigrationResult

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# 51 KiB: less than the device, so that something goes in PRE_COPY however slow the machine is.
FITS_NOT = ["--avail-switchover-bandwidth", "512K", "--downtime-limit", "100"]
PAUSING = ((CAPABILITY, True),)


def statuses(result: MigrationResult) -> list[str]:
    """Return what the source's QEMU said of the migration, in order."""
    return [one["data"]["status"] for one in result.qemu.events_source if one["event"] == "MIGRATION"]


@pytest.mark.parametrize("ack", [False, True], ids=["", "with switchover-ack, as newer libvirt asks for"])
def test_the_device_waits_in_stop_copy(options: Options, tmp_path: Path, ack: bool) -> None:
    """The VM stops, then QEMU waits; STOP_COPY's data follow the answer, and both sides are equal."""
    chosen = options(capabilities=PAUSING, switchover_ack=ack)
    result = asyncio.run(run(chosen, tmp_path / "logs", []))
    assert result.problems == []
    seen = statuses(result)
    assert seen.index("active") < seen.index(PAUSED) < seen.index("completed")
    assert set(result.qemu.capabilities) >= {CAPABILITY, *(["switchover-ack"] if ack else [])}
    (device,) = result.devices
    assert device.digest_match
    assert device.precopy_bytes > 0
    assert device.stop_copy_bytes > 0
    assert result.guest is not None
    assert result.guest.verified
    times = {
        one["data"].get("status", one["event"]): one["time"]
        for one in result.qemu.events_source
        if one["event"] in ("MIGRATION", "STOP")
    }
    assert times["STOP"] <= times[PAUSED]
    stopped = next(one["time"] for one in device.transitions_source if one["to"] == "STOP_COPY")
    ended = next(one["time"] for one in device.transitions_source if one["from"] == "STOP_COPY")
    assert stopped <= times[PAUSED] <= ended


def test_given_up_in_the_pause_and_tried_again(options: Options, in_lab: InLab) -> None:
    """Nobody answers: the device stays in STOP_COPY, unread. Cancelled, it runs; the next try completes."""

    async def scenario(lab: Lab) -> MigrationResult:
        await lab.configure()
        await lab.begin(await lab.listen())
        row = await lab.wait_for(lambda row: row["status"] == PAUSED, "the pause")
        for _ in range(3):
            row = await lab.sample()
            assert row["status"] == PAUSED
            assert row["source"][0]["state"] == "STOP_COPY"
            assert row["source"][0]["stop_copy_bytes"] == 0
        assert await lab.source.qemu.run_state() != "running"
        await lab.source.qemu.execute("migrate_cancel")
        assert (await lab.wait_final())["status"] == "cancelled"
        await lab.wait_running(lab.source.qemu)
        assert (await lab.source.servers[0].status())["state"] == "RUNNING"
        await lab.replace_destination()
        assert (await lab.migrate())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        result = MigrationResult()
        await lab.guest.follow(lab.destination.qemu)
        await lab.guest.stop()
        result.guest = await lab.guest.verify()
        await lab.collect(result)
        judge(result, True)
        return result

    result = in_lab(options(capabilities=PAUSING, load=dirtying(256 * KIB)), scenario)
    assert result.problems == []
    assert statuses(result).count(PAUSED) == 2


def test_the_command_has_it(qemu: Path, library: Path, tmp_path: Path) -> None:
    """`lab migrate --pause-before-switchover`, with what a report says of it."""
    command = [*VFU_DEV, "lab", "migrate", "--guest", "none", "--memory", "256K", "--dirty-rate", "16p"]
    command += FITS_NOT
    command += ["--pause-before-switchover", "--quiet", "--out", str(tmp_path), "--json", "-"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode in (0, 3), said.stderr
    report = json.loads(said.stdout)
    assert CAPABILITY in report["qemu"]["capabilities"]
    assert report["devices"][0]["digest_match"]
