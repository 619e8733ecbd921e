"""`lab watch`: migrations of QEMUs that somebody else started, begun by it or only looked at."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, begin_and_stay, dirtying, let_go, stay
from schemakit import conforms
from serverkit import PATIENCE_SECONDS, VFU_DEV

from vfu_dev.errors import ConfigError, LabError
from vfu_dev.lab import watch as watching
from vfu_dev.lab.clocks import align, compare_clocks
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.lab.watch import Watcher, WatchOptions, watch

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]


def arguments(lab: Lab, source: Path, destination: Path) -> list[str]:
    """Return the options that name both sides of a lab, by these monitors."""
    words = ["--qmp-source", str(source), "--qmp-destination", str(destination)]
    for side, host in (("source", lab.source), ("destination", lab.destination)):
        for server in host.servers:
            words += [f"--control-{side}", str(server.control)]
    return words


def second_monitors(lab: Lab) -> list[Path]:
    """Have both QEMUs, which are yet to be started, make one monitor more; return their sockets."""
    monitors = []
    for host in (lab.source, lab.destination):
        monitors.append(lab.sockets / f"{host.name}-second.qmp")
        host.qemu.process.argv += ["-qmp", f"unix:{monitors[-1]},server=on,wait=off"]
    return monitors


def watched(lab: Lab, uri: str | None = None) -> WatchOptions:
    """Return the same as options of `watch`, by the lab's own monitors."""
    hosts = (lab.source, lab.destination)
    controls = [tuple(server.control for server in host.servers) for host in hosts]
    return WatchOptions(*(host.qemu.qmp_socket for host in hosts), *controls, uri)


async def command(*words: str) -> asyncio.subprocess.Process:
    """Start `vfu-dev lab watch`."""
    return await asyncio.create_subprocess_exec(
        *VFU_DEV, "lab", "watch", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def until_active(process: asyncio.subprocess.Process) -> str:
    """Return what the command says up to the line of a sample in which the migration is active."""
    assert process.stderr is not None
    said = ""
    while "  active" not in said:
        line = await asyncio.wait_for(process.stderr.readline(), PATIENCE_SECONDS)
        assert line, said
        said += line.decode()
    return said


def judge_report(report: dict[str, Any], devices: int) -> None:
    """Assert that a migration was seen whole: its passes and bytes, both sides' digests, one clock."""
    conforms("lab-migrate", report)
    assert report["problems"] == []
    assert report["status"] == report["qemu"]["status"] == "completed"
    assert len(report["devices"]) == devices
    for device in report["devices"]:
        assert device["digest_match"]
        assert device["precopy_bytes"] > 0
        assert device["stop_copy_bytes"] > 0
        assert device["samples_source"]["rows"]
    assert report["qemu"]["front_end"] == "vfio-user-pci"
    assert report["qemu"]["downtime_ms"] is not None
    assert {row["status"] for row in report["samples"]} >= {"active", "completed"}
    # Both sides are on this machine.
    assert abs(report["clocks"]["ahead_seconds"]) <= report["clocks"]["error_seconds"]
    assert not report["clocks"]["differ"]


def test_it_begins_the_migration(options: Options, tmp_path: Path) -> None:
    """`--migrate URI`: two devices, as in the lab; report, page and summary are there."""

    async def scenario() -> tuple[dict[str, Any], str]:
        async with Lab(options(devices=2, load=dirtying(0)), tmp_path / "logs") as lab:
            monitors = second_monitors(lab)
            await lab.start()
            await stay(lab)  # it cannot miss the migration, however late it looks
            words = ["--migrate", f"unix:{lab.sockets}/move.sock", "--out", str(tmp_path / "out")]
            process = await command(*arguments(lab, *monitors), *words, "--json", "-")
            said = await until_active(process)
            await let_go(lab)
            out, err = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
            said += err.decode()
            assert process.returncode == 0, said
            return json.loads(out), said

    report, said = asyncio.run(scenario())
    judge_report(report, 2)
    assert report["qemu"]["parameters"]["downtime_limit"] == 100
    assert "digests equal" in said
    assert re.search(r"clocks may be the same: they differ by \d+\.\d ms, give or take", said)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Live migration" in page
    assert "clocks may be the same" in page


def test_it_only_looks(options: Options, tmp_path: Path) -> None:
    """Without, it waits for a migration that somebody begins, and is no part of it."""

    async def scenario() -> dict[str, Any]:
        async with Lab(options(load=dirtying(256 * KIB)), tmp_path / "logs") as lab:
            monitors = second_monitors(lab)
            await lab.start()
            process = await command(*arguments(lab, *monitors), "--out", str(tmp_path / "out"), "--json", "-")
            assert process.stderr is not None
            assert b"waiting for a migration to begin" in await process.stderr.readline()
            await begin_and_stay(lab)
            await until_active(process)
            await let_go(lab)
            assert (await lab.wait_final())["status"] == "completed"
            out, err = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
            assert process.returncode == 0, err.decode()
            return dict(json.loads(out))

    judge_report(asyncio.run(scenario()), 1)


def test_a_source_that_its_owner_ends(options: Options, tmp_path: Path) -> None:
    """As libvirt does once a VM has moved: the events tell how it ended, the servers what was sent."""

    async def scenario() -> tuple[dict[str, Any], dict[str, Any]]:
        async with Lab(options(load=dirtying(0)), tmp_path / "logs") as lab:
            monitors = second_monitors(lab)
            await lab.start()
            chosen = replace(watched(lab), qmp_source=monitors[0], qmp_destination=monitors[1])
            watcher = Watcher(chosen)
            for side in (watcher.source, watcher.destination):
                await side.open()
            before = await watcher.sample()
            await lab.migrate()
            await watcher.source.qemu.wait_event("MIGRATION", status="completed")
            await lab.source.qemu.stop()
            after = await watcher.sample()
            result = MigrationResult()
            await watcher.collect(result)
            result.qemu.status = after["status"]
            judge(result, None, verified=False)
            assert result.problems == []
            assert result.qemu.run_state_source is None
            assert result.devices[0].digest_match
            for side in (watcher.source, watcher.destination):
                await side.close()
            return before, after

    before, after = asyncio.run(scenario())
    assert (before["status"], after["status"]) == ("none", "completed")


def test_it_says_what_failed(options: Options, in_lab: InLab, tmp_path: Path) -> None:
    """A destination with another device: status 1, the reason, and the VM runs on at the source."""

    async def scenario(lab: Lab) -> MigrationResult:
        await lab.replace_destination(replace(lab.options, memory_bytes=2 * MIB))
        for host in (lab.source, lab.destination):
            await host.qemu.disconnect()
        controls = [
            tuple(server.control for server in host.servers) for host in (lab.source, lab.destination)
        ]
        sockets = [host.qemu.qmp_socket for host in (lab.source, lab.destination)]
        uri = f"unix:{lab.sockets}/move.sock"
        found = await watch(WatchOptions(*sockets, *controls, uri), [])
        lab.source.qemu = found_again(lab)
        return found

    def found_again(lab: Lab) -> Any:
        return lab.source.qemu

    result = in_lab(options(load=dirtying(0)), scenario)
    assert result.status == "failed"
    assert result.qemu.status == "failed"
    assert any("another shape" in text for text in result.problems), result.problems
    assert result.qemu.run_state_source == "running"
    assert result.devices[0].state_source == "RUNNING"


def test_a_monitor_that_is_taken_is_said(
    options: Options, in_lab: InLab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A monitor has one client: who comes second reads what to do. So does who names no socket."""
    monkeypatch.setattr(watching, "GREETING_SECONDS", 0.5)

    async def scenario(lab: Lab) -> None:
        controls = [
            tuple(server.control for server in host.servers) for host in (lab.source, lab.destination)
        ]
        taken = WatchOptions(lab.source.qemu.qmp_socket, lab.destination.qemu.qmp_socket, *controls)
        with pytest.raises(LabError, match="second -qmp"):
            await watch(taken, [])
        with pytest.raises(LabError, match="no such socket; QEMU makes one with"):
            await watch(replace(taken, qmp_source=tmp_path / "none"), [])
        assert await lab.source.qemu.run_state() == "running"

    in_lab(options(load=dirtying(0)), scenario)
    with pytest.raises(ConfigError, match="1 devices at the source, 2 at the destination"):
        WatchOptions(Path("a"), Path("b"), (Path("c"),), (Path("d"), Path("e")))


def test_clocks_are_told_apart_by_events(options: Options, in_lab: InLab) -> None:
    """Of a real move with the destination's clock set: found within its error, and undone."""

    async def scenario(lab: Lab) -> MigrationResult:
        return await lab.move()

    result = in_lab(options(load=dirtying(0)), scenario)
    same = compare_clocks(result)
    assert same is not None
    assert abs(same.ahead_seconds) <= same.error_seconds
    # By more than any downtime: the error is half of the downtime.
    for seconds, word in ((7500.5, "ahead of"), (-3250.25, "behind")):
        set_apart = copy.deepcopy(result)
        rows = [*set_apart.qemu.events_destination, *set_apart.qemu.trace_destination]
        rows += set_apart.devices[0].transitions_destination
        for row in rows:
            row["time"] += seconds
        found = compare_clocks(set_apart)
        assert found is not None
        assert abs(found.ahead_seconds - seconds) <= found.error_seconds + 1e-6
        assert found.differ
        assert f"is {word} the source's by" in found.text
        align(set_apart, found)
        again = compare_clocks(set_apart)
        assert again is not None
        assert again.ahead_seconds == pytest.approx(0, abs=1e-6)
    result.qemu.status = "failed"
    assert compare_clocks(result) is None
