"""Runs a scenario: every point, resumable, into one folder.

The folder: `scenario.toml` as run; `points/NAME.csv` and `.json` of each finished point; `moves.csv`, all
moves; `summary.json`; `failures/`, logs of the first moves that went wrong. An interrupted point has no
`.json` yet and is run again from its beginning: its VM is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vfu_dev.builds import artifact
from vfu_dev.errors import ConfigError
from vfu_dev.lab.host import require_migration
from vfu_dev.lab.observer import MoveReporter
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.series.rows import CsvFile, Row, read_rows, write_rows
from vfu_dev.series.scenario import Point, Scenario
from vfu_dev.series.shuttle import Shuttle
from vfu_dev.series.summary import (
    SUMMARY,
    machine,
    point_summary,
    reached,
    read_json,
    summarise,
    versions,
    write_json,
)

# A summary of one point for the reporter; see `run_scenario`.
Annotate = Callable[[Point, Sequence[Row]], dict[str, Any]]


@dataclass(frozen=True)
class Artifacts:
    """What was built for the lab. `guest` is needed by points with a Linux guest.

    `chosen` are fields of MigrateOptions that say more about the QEMUs.
    """

    qemu: Path
    library: Path
    guest: Path | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, points: Sequence[Point], chosen: Mapping[str, Any] | None = None) -> Artifacts:
        """Return the artifacts that `points` need. Raises: BuildError: one is missing.

        Args:    chosen: fields of MigrateOptions that say which QEMUs; by default the built one.
        """
        linux = any(point["qemu.guest"] == "linux" for point in points)
        chosen = dict(chosen or {"qemu": artifact("qemu")})
        return cls(chosen.pop("qemu"), artifact("libvfio-user"), artifact("guest") if linux else None, chosen)

    def options(self, point: Point) -> MigrateOptions:
        """Return the lab's options for `point`."""
        return replace(point.options(self.qemu, self.library, self.guest), **self.chosen)


def run_scenario(
    scenario: Scenario,
    out: Path,
    reporter: MoveReporter | None = None,
    *,
    short: bool = False,
    resume: bool = False,
    force: bool = False,
    command: Sequence[str] = (),
    artifacts: Artifacts | None = None,
    annotate: Annotate | None = None,
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

    Raises:  ConfigError: `out` holds something else. BuildError, LabError: the run cannot be made.
    """
    run = _Run(scenario, out, reporter, short, resume, force, command, artifacts, annotate)
    return asyncio.run(run.run())


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        out: Path,
        reporter: MoveReporter | None,
        short: bool,
        resume: bool,
        force: bool,
        command: Sequence[str],
        artifacts: Artifacts | None,
        annotate: Annotate | None,
    ) -> None:
        self.scenario = scenario
        self.out = out
        self.short = short
        self.resume = resume
        self.force = force
        self.points = scenario.chosen(short)
        self.artifacts = artifacts or Artifacts.find(self.points)
        self.reporter: MoveReporter = reporter or (lambda what, data: None)
        self.annotate = annotate
        self.command = list(command)
        self.libvfio_user = ""
        self._files = out / "points"
        self._first: dict[str, Any] = {}

    async def run(self) -> dict[str, Any]:
        options = self.artifacts.options(self.points[0])
        both = (options.qemu_source, options.qemu_incoming)
        qemus = " and ".join(dict.fromkeys(require_migration(choice) for choice in both))
        self._prepare()
        groups = [list(group) for _, group in itertools.groupby(self.points, lambda p: list(p.sweep.items()))]
        todo = [group for group in groups if not all(self._finished(point) for point in group)]
        moves = sum(point["run.moves"] for point in self.points)
        left = sum(point["run.moves"] for group in todo for point in group)
        self.reporter("plan", {"points": len(self.points), "moves": moves, "done": moves - left})
        for group in todo:
            await self._run_group(group)
        shutil.rmtree(self.out / "logs", ignore_errors=True)
        facts = {
            "versions": {
                **versions(qemus),
                "libvfio-user": self._libvfio_user(),
            },
            "machine": self._first["machine"],
            "command": self.command,
            "changes": self._form()["changes"],
            "started": self._first["started"],
            "ended": time.time(),
        }
        rows = [row for point in self.points for row in read_rows(self._files / f"{point.name}.csv")]
        write_rows(self.out / "moves.csv", rows)
        points = [read_json(self._files / f"{point.name}.json") for point in self.points]
        summary = summarise(self.scenario, self.short, points, rows, facts)
        write_json(self.out / SUMMARY, summary)
        return summary

    def _libvfio_user(self) -> str:
        told = (read_json(self._files / f"{p.name}.json").get("libvfio_user") for p in self.points)
        return next((text for text in told if text), "")

    def _prepare(self) -> None:
        """Make the folder, or check that the existing one belongs to this scenario."""
        kept = self.out / "scenario.toml"
        is_run = kept.is_file() and (self.out / "form.json").is_file()
        # A run that failed before its first move has no results to lose.
        if is_run and not self.resume and (self.force or not self._has_moves()):
            shutil.rmtree(self.out)
        if kept.exists():
            if not self.resume:
                raise ConfigError(
                    f"{self.out}: holds a run already; --resume goes on with it, --force starts anew"
                )
            form = read_json(self.out / "form.json")
            differs = [key for key, value in self._form().items() if form.get(key) != value]
            if kept.read_text(encoding="utf-8") != self.scenario.text:
                differs.append("scenario.toml")
            if differs:
                raise ConfigError(
                    f"{self.out}: holds another run, with other {', '.join(differs)}; "
                    "--force starts anew, --out chooses another folder"
                )
        elif self.out.exists() and any(self.out.iterdir()):
            raise ConfigError(f"{self.out}: not empty, and no run of a scenario; choose another folder")
        self._files.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            # A resumed run keeps the facts of its beginning: its figures were measured with them.
            write_json(self.out / "form.json", {**self._form(), "machine": machine(), "started": time.time()})
        self._first = read_json(self.out / "form.json")
        kept.write_text(self.scenario.text, encoding="utf-8")

    def _has_moves(self) -> bool:
        return any(read_rows(path) for path in self._files.glob("*.csv"))

    def _form(self) -> dict[str, Any]:
        changes = {key: str(value) for key, value in self.scenario.changes.items()}
        chosen = {"qemu": self.artifacts.qemu, **self.artifacts.chosen}
        qemus = {key: str(value) for key, value in chosen.items() if value is not None}
        return {"scenario": self.scenario.name, "short": self.short, "changes": changes, "qemus": qemus}

    def _finished(self, point: Point) -> bool:
        path = self._files / f"{point.name}.json"
        if not path.exists() or not (self._files / f"{point.name}.csv").exists():
            return False
        found = read_json(path)
        same = json.loads(json.dumps(point.to_dict()))
        return bool(all(found.get(key) == value for key, value in same.items()))

    async def _run_group(self, group: Sequence[Point]) -> None:
        """Move the VMs of all variants in turns, so that other work on the machine disturbs all of them
        alike.

        All of them exist at the same time; those whose turn it is not are stopped (QMP `stop`).
        """
        for point in group:
            (self._files / f"{point.name}.json").unlink(missing_ok=True)
        alone = len(group) == 1
        async with contextlib.AsyncExitStack() as stack:
            vms: list[tuple[Shuttle, CsvFile, list[Row]]] = []
            for point in group:
                self.reporter("point", {"name": point.name, "number": self.points.index(point) + 1})
                vm = Shuttle(
                    point,
                    self.artifacts.options(point),
                    self.out / "logs" / point.name,
                    self.out / "failures",
                    self.reporter,
                )
                stack.push_async_callback(vm.stop)
                file = stack.enter_context(CsvFile(self._files / f"{point.name}.csv"))
                await vm.start()
                if not alone and vm.lab is not None:
                    await vm.pause()
                vms.append((vm, file, []))
            for number in range(1, max(point["run.moves"] for point in group) + 1):
                for vm, file, rows in vms:
                    if number <= vm.point["run.moves"] and vm.lab is not None:
                        await self._turn(vm, number, file, rows, alone)
            for vm, _, rows in vms:
                await self._finish(vm, rows, alone)

    async def _turn(self, vm: Shuttle, number: int, file: CsvFile, rows: list[Row], alone: bool) -> None:
        if not alone:
            await vm.go_on()
        row = await vm.move(number)
        file.append(row)
        rows.append(row)
        self.reporter("move", {"row": row, "point": vm.point.name})
        if not alone and vm.lab is not None:
            await vm.pause()

    async def _finish(self, vm: Shuttle, rows: list[Row], alone: bool) -> None:
        if vm.lab is not None:
            if not alone:
                await vm.go_on()
            await vm.finish()
            await vm.stop()
        entry = {**vm.point.to_dict(), **point_summary(rows)}
        entry |= {"problems": vm.problems, "guest": vm.guest, "load_status": vm.load, "policy": vm.policy}
        entry["libvfio_user"] = vm.libvfio_user
        entry["rate"] = reached(vm.guest, vm.load)
        if self.annotate is not None:
            entry |= self.annotate(vm.point, rows)
        write_json(self._files / f"{vm.point.name}.json", entry)
