"""The progress of a scenario for people: bars on a terminal, a line for each move elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vfu_dev.lab.progress import SILENT_SECONDS, start_pulse
from vfu_dev.series.rows import COMPLETED, Row
from vfu_dev.series.run import RunEvent
from vfu_dev.sizes import format_count, format_duration, format_left

# Seconds between two lines about the state of a move, without a terminal.
STANDS_SECONDS = 2.0


class RunProgress:
    """Observes `run_scenario`; a context manager around it. `quiet` shows nothing."""

    def __init__(self, console: Console, name: str, quiet: bool = False) -> None:
        self._console = console
        self._name = name
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._points = 0
        self._moves = self._done = self._before = 0
        self._started = time.monotonic()
        self._stood = self._event = self._started  # the last line, and the last move or point
        self._over = threading.Event()

    def __enter__(self) -> RunProgress:
        if not self._quiet and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("moves"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[last]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self._name, total=None, last="")
            self._bar.start()
        elif not self._quiet:
            self._over = start_pulse(self._break_silence)
        return self

    def _break_silence(self) -> None:
        """Say that a point goes on: its VM boots, or a move takes long."""
        now = time.monotonic()
        if now - self._stood >= SILENT_SECONDS:
            self._line(
                f"  move {self._done + 1} of {self._moves}: {format_duration(now - self._event)} so far"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: RunEvent, data: dict[str, Any]) -> None:
        """Take one observation."""
        if what == "plan":
            self._points = data["points"]
            self._moves, self._done, self._before = data["moves"], data["done"], data["done"]
            if self._bar is not None:
                self._bar.update(self._task, total=data["moves"], completed=data["done"])
            done = f", {data['done']} moves done before" if data["done"] else ""
            points, moves = format_count(data["points"], "point"), format_count(data["moves"], "move")
            self._line(f"{self._name}: {points}, {moves}{done}")
        elif what == "point":
            self._event = time.monotonic()
            text = f"{self._name} [{data['number']}/{self._points}] {data['name']}"
            if self._bar is not None:
                self._bar.update(self._task, description=text.replace("[", r"\["))
            self._line(text)
        elif what == "move":
            text, self._event = describe(data["row"]), time.monotonic()
            self._done += 1
            if self._bar is not None:
                self._bar.update(self._task, advance=1, last=text)
            self._line(f"  {text}{self._far()}")
        elif what == "again":
            self._done -= data["moves"]
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
            self._line(f"{self._name} {data['point']}: once more from its beginning")
        elif what == "convergence":
            self._stands(str(data["text"]))
        elif what == "note" and not self._quiet:
            self._console.print(
                f"{self._name}: {data['text']}", markup=False, highlight=False, soft_wrap=True
            )

    def _far(self) -> str:
        """Return how far the run is, when a line is due about it: each tenth of the way."""
        step = max(1, self._moves // 10)
        if self._done % step or self._done == self._moves:
            return ""
        pace = (self._done - self._before) / (time.monotonic() - self._started)
        return f"  ({format_left(self._done, self._moves, pace)})"

    def _stands(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, last=text)
        elif time.monotonic() - self._stood >= STANDS_SECONDS:
            self._line(f"  {text}")

    def _line(self, text: str) -> None:
        if self._quiet or self._bar is not None:
            return
        self._stood = time.monotonic()
        line = f"[{self._stood - self._started:6.1f} s] {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe(row: Row) -> str:
    """Return a move in one line."""
    if row.status != COMPLETED:
        return f"{row.point} {row.move}: {row.status}: {row.text}"
    figures = (("downtime", "downtime_ms"), ("total", "total_ms"))
    parts = [f"{label} {row.metrics[key]:.0f} ms" for label, key in figures if key in row.metrics]
    parts.append(format_count(round(row.metrics.get("passes", 0)), "pass"))
    return f"{row.point} {row.move}: {', '.join(parts)}"
