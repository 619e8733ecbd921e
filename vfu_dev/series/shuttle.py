"""Runs one point of a scenario: moves a running VM back and forth, one row per move."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vfu_dev.errors import LabError
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.observer import MoveReporter, TimeLimitError
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.series.folder import KEPT_FAILURES
from vfu_dev.series.replays import Replays
from vfu_dev.series.rows import COMPLETED, FAILED, NOT_CONVERGED, Row, row_of
from vfu_dev.series.scenario import Point

# A log line for each size query of QEMU would be a large part of the cost of 70 moves; states suffice.
TRACES = ("vfio_migration_set_state",)
# Bytes kept of the end of each file.
KEPT_LOG_BYTES = 1 << 20
# Number of times that a lost VM is restarted before the point is given up.
RESTARTS = 2


class Shuttle:
    """The VM of one point.

    Args:
        options: of the point.
        logs: a folder of its own; emptied at the end.
        failures: where logs of moves that went wrong are kept.
    """

    def __init__(
        self, point: Point, options: MigrateOptions, logs: Path, failures: Path, reporter: MoveReporter
    ) -> None:
        self.point = point
        self.options = replace(options, traces=TRACES)
        self.lab: Lab | None = None
        self.problems: list[str] = []
        self.guest: dict[str, Any] | None = None
        self.load: dict[str, Any] | None = None
        self.policy: list[dict[str, Any]] = []  # what its rules did in the last move
        self.libvfio_user = ""
        self.replays = Replays()
        self._logs = logs
        self._failures = failures
        self._reporter = reporter
        self._restarts = 0
        self._random = random.Random(point.name)

    async def start(self) -> None:
        """Start the VM and its load. Where that fails, `lab` stays None and `problems` say why."""
        self.lab = Lab(self.options, self._logs, self._reporter)
        try:
            await self.lab.start()
        except (LabError, OSError) as error:
            self.problems.append(str(error))
            self._keep_logs(0)
            await self.stop()

    async def stop(self) -> None:
        """End everything and remove the logs."""
        if self.lab is not None:
            await self.lab.close()
            self.lab = None
        shutil.rmtree(self._logs, ignore_errors=True)

    @property
    def _running(self) -> Lab:
        assert self.lab is not None
        return self.lab

    async def pause(self) -> None:
        """Stop the VM until `go_on`, so that another point has the machine. Raises: LabError."""
        await self._running.pause()

    async def go_on(self) -> None:
        """Let the VM run on. Raises: LabError."""
        await self._running.go_on()

    async def move(self, number: int) -> Row:
        """Move once. Errors are in the row; after a failure the VM is restarted, at most RESTARTS times.

        After the last time there is no VM any more: `lab` is None.
        """
        lab = self._running
        await asyncio.sleep(self.options.settle_seconds + self._random.uniform(0, self.point["run.jitter"]))
        result = MigrationResult(started=time.time())
        status, text = FAILED, ""
        try:
            result = await lab.move()
            status = COMPLETED
        except TimeLimitError as error:
            status = NOT_CONVERGED
            text = lab.convergence.text if lab.convergence else str(error)
        except (LabError, OSError) as error:
            text = str(error)
        if status == COMPLETED:
            either = self.options.replays or self.options.pre_copy
            judge(result, None if either else False, verified=False)
            if result.problems:
                status, text = FAILED, "; ".join(result.problems)
        self.libvfio_user = result.versions.get("libvfio-user", self.libvfio_user)
        try:
            await self._after(lab, status, result)
        except (LabError, OSError) as error:
            status, text = FAILED, f"{text}; {error}" if text else str(error)
        self.replays.take(number, result, status == COMPLETED)
        row = row_of(self.point.name, number, status, result, text)
        self.policy = result.policy
        if status == FAILED:
            self.problems.append(f"move {number}: {text}")
            self._keep_logs(number)
            await self._recover()
        elif self.point["run.expect"] not in (status, "either"):
            self.problems.append(f"move {number}: {status}, {self.point['run.expect']} was expected: {text}")
            self._keep_logs(number)
        return row

    async def _after(self, lab: Lab, status: str, result: MigrationResult) -> None:
        """Make the next move possible."""
        if status == COMPLETED:
            await lab.turn_around()
        elif status == NOT_CONVERGED:
            await lab.give_up()
            if (await lab.source.qemu.migration()).get("status") == "completed":
                raise LabError("the migration was completed while it was being cancelled")
            await lab.collect(result)
            lab.destination.remove_logs()
            await lab.replace_destination()
            await lab.forget()

    async def _recover(self) -> None:
        await self.stop()
        if self._restarts >= RESTARTS:
            self.problems.append(f"given up after {RESTARTS + 1} moves that failed")
            return
        self._restarts += 1
        self.replays.forget()
        self._reporter("phase", {"text": f"{self.point.name}: starting the VM anew"})
        await self.start()

    async def finish(self) -> None:
        """End the load and, where the point asks for it, have the guest read everything back."""
        lab = self._running
        try:
            if self.options.load_place == "device":
                self.load = await lab.source.servers[0].command("load-status")
                return
            await lab.guest.stop()
            found, via = lab.guest.figures(), self.options.read_back
            if via is not None:
                self._reporter("phase", {"text": f"{self.point.name}: everything is read back"})
                found = await lab.guest.verify(via)
                if not found.verified:
                    self.problems.append(f"guest: {found.problem()}")
            self.guest = asdict(found)
        except LabError as error:
            self.problems.append(str(error))

    def _keep_logs(self, number: int) -> None:
        """Copy the end of each log, of the first failed moves only: later ones would show the same."""
        kept = len(list(self._failures.glob("*"))) if self._failures.exists() else 0
        if kept >= KEPT_FAILURES:
            return
        folder = self._failures / f"{self.point.name}-move{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for log in self._logs.glob("*.log"):
            with contextlib.suppress(OSError), log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - KEPT_LOG_BYTES))
                (folder / log.name).write_bytes(file.read())
