"""Runs a scenario: every point, resumable, into one folder (`folder` says what that holds)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from vfu_dev.lab.observer import MoveEvent
from vfu_dev.series.artifacts import Artifacts
from vfu_dev.series.folder import FAILURES, RunFolder
from vfu_dev.series.parts import Shard
from vfu_dev.series.rows import CsvFile, Row
from vfu_dev.series.scenario import Point, Scenario
from vfu_dev.series.shuttle import Shuttle
from vfu_dev.series.summary import machine, point_summary, reached, write_json

# What a run reports: its own events, and those of its Labs.
RunEvent = MoveEvent | Literal["plan", "point", "move", "again", "note"]
RunReporter = Callable[[RunEvent, dict[str, Any]], None]
# A summary of one point for the reporter; see `run_scenario`.
Annotate = Callable[[Point, Sequence[Row]], dict[str, Any]]


def run_scenario(
    scenario: Scenario,
    out: Path,
    reporter: RunReporter | None = None,
    *,
    short: bool = False,
    resume: bool = False,
    force: bool = False,
    command: Sequence[str] = (),
    artifacts: Artifacts | None = None,
    annotate: Annotate | None = None,
    shard: Shard | None = None,
    groups: Sequence[Sequence[Point]] | None = None,
) -> dict[str, Any]:
    """Run all points of `scenario` and return the summary, which is also `out`/summary.json.

    Args:
        out: the result folder; made, and refused when it holds moves of a run, unless `resume` or `force`.
        reporter: gets `plan` (points, moves, done), `point` (name, number), `move` (row, point), `phase`
            (text), and the observations of a Lab (`sample`, `convergence`, `verify`).
        short: the short form.
        resume: go on with what is in `out`; finished points are not repeated.
        force: delete the run that `out` holds.
        annotate: adds what it returns to the summary of each finished point (a model's prediction, say).
        shard, groups: the part of the run that is made here, and the groups of points in it.

    Raises: ConfigError: `out` holds something else. BuildError, LabError: the run cannot be made.
    """
    points = scenario.chosen(short)
    artifacts = artifacts or Artifacts.find(points)
    made_with = {"versions": artifacts.versions(points[0]), "qemus": artifacts.qemus()}
    folder = RunFolder(out, scenario, short, made_with, shard, groups)
    folder.prepare(resume=resume, force=force)
    reporter = reporter or (lambda what, data: None)
    reporter("plan", folder.plan())
    todo = folder.todo()
    asyncio.run(run_groups(folder, todo, artifacts, reporter, annotate))
    return folder.complete(command)


async def run_groups(
    folder: RunFolder,
    groups: Sequence[Sequence[Point]],
    artifacts: Artifacts,
    reporter: RunReporter,
    annotate: Annotate | None = None,
) -> None:
    """Make the points of `groups`, a group after the other; each has its files in `folder` when it is done.

    Raises: LabError: a VM that waits for its turn cannot be stopped.
    """
    for group in groups:
        await _Group(folder, group, artifacts, reporter, annotate).run()


class _Group:
    def __init__(
        self,
        folder: RunFolder,
        group: Sequence[Point],
        artifacts: Artifacts,
        reporter: RunReporter,
        annotate: Annotate | None,
    ) -> None:
        self.folder, self.group, self.artifacts = folder, group, artifacts
        self.reporter, self.annotate = reporter, annotate
        self.alone = len(group) == 1
        # When the group begins: its load average says how busy the machine was before these moves.
        self.machine = machine()
        self.started = time.time()

    async def run(self) -> None:
        """Move the VMs of all variants in turns, so that other work on the machine disturbs all of them
        alike.

        All of them exist at the same time; those whose turn it is not are stopped (QMP `stop`).
        """
        for point in self.group:
            self.folder.entry_path(point).unlink(missing_ok=True)
        async with contextlib.AsyncExitStack() as stack:
            vms: list[tuple[Shuttle, CsvFile, list[Row]]] = []
            for point in self.group:
                number = self.folder.points.index(point) + 1
                self.reporter("point", {"name": point.name, "number": number})
                vm = Shuttle(
                    point,
                    self.artifacts.options(point),
                    self.folder.path / "logs" / point.name,
                    self.folder.path / FAILURES,
                    self.reporter,
                )
                stack.push_async_callback(vm.stop)
                file = stack.enter_context(CsvFile(self.folder.rows_path(point)))
                await vm.start()
                if not self.alone and vm.lab is not None:
                    await vm.pause()
                vms.append((vm, file, []))
            for number in range(1, max(point["run.moves"] for point in self.group) + 1):
                for vm, file, rows in vms:
                    if number <= vm.point["run.moves"] and vm.lab is not None:
                        await self._turn(vm, number, file, rows)
            for vm, _, rows in vms:
                await self._finish(vm, rows)

    async def _turn(self, vm: Shuttle, number: int, file: CsvFile, rows: list[Row]) -> None:
        if not self.alone:
            await vm.go_on()
        row = await vm.move(number)
        row.machine = self.machine["id"]
        file.append(row)
        rows.append(row)
        self.reporter("move", {"row": row, "point": vm.point.name})
        if not self.alone and vm.lab is not None:
            await vm.pause()

    async def _finish(self, vm: Shuttle, rows: list[Row]) -> None:
        if vm.lab is not None:
            if not self.alone:
                await vm.go_on()
            await vm.finish()
            await vm.stop()
        entry = {**vm.point.to_dict(), **point_summary(rows)}
        entry |= {"problems": vm.problems, "guest": vm.guest, "load_status": vm.load, "policy": vm.policy}
        entry["not_kept"] = vm.replays.not_kept
        entry["libvfio_user"] = vm.libvfio_user
        entry["rate"] = reached(vm.guest, vm.load)
        entry |= {"machine": self.machine, "started": self.started, "ended": time.time()}
        if self.annotate is not None:
            entry |= self.annotate(vm.point, rows)
        write_json(self.folder.entry_path(vm.point), entry)
