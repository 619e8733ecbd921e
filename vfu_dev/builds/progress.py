"""Progress of builds: a live line in a terminal, plain lines at a steady pace elsewhere. All on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# A silent CI log looks like a hang; one line per this time shows that it is none.
PLAIN_INTERVAL_SECONDS = 15.0


class Step:
    """One piece of work that takes seconds. Call `tick` for every line of output."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.done = 0
        self.total = 0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started

    def update(self, done: int, total: int) -> None:
        """Set ninja's [done/total]. The total may grow while ninja finds more work."""
        self.done, self.total = done, total
        self.tick()

    def tick(self) -> None:
        """Show that the step still runs."""


class _PlainStep(Step):
    def __init__(self, title: str, out: TextIO, interval_seconds: float) -> None:
        super().__init__(title)
        self._out = out
        self._interval = interval_seconds
        self._spoke = self.started
        self.announced = False

    def tick(self) -> None:
        now = time.monotonic()
        if not self.announced and now - self.started >= 1.0:
            self.announced = True
            print(f"{self.title} …", file=self._out, flush=True)
        if now - self._spoke >= self._interval:
            self._spoke = now
            count = f" [{self.done}/{self.total}]" if self.total else ""
            print(f"{self.title}:{count} {now - self.started:.0f} s", file=self._out, flush=True)


class Reporter:
    """Plain text: a line for a step of more than 1 s, one every 15 s while it runs, and one at its end."""

    def __init__(self, out: TextIO | None = None, interval_seconds: float = PLAIN_INTERVAL_SECONDS) -> None:
        self._out = out if out is not None else sys.stderr
        self._interval = interval_seconds

    def say(self, text: str) -> None:
        """Print a line that stays."""
        print(text, file=self._out, flush=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show `title` during the block, and its time afterwards."""
        step = _PlainStep(title, self._out, self._interval)
        yield step
        self.say(f"{title}: {step.seconds:.1f} s")


class TerminalReporter(Reporter):
    """One live line, with a bar once ninja has reported a total; finished steps stay above it."""

    def __init__(self) -> None:
        super().__init__()
        # Importing rich takes 0.1 s, for which a build without work need not wait; here and in `step`.
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show `title` with spinner, bar, ninja's count and time during the block."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(title, total=None, count="")

            class LiveStep(Step):
                def update(self, done: int, total: int) -> None:
                    super().update(done, total)
                    progress.update(task, completed=done, total=total, count=f"[{done}/{total}]")

            step = LiveStep(title)
            yield step
        self._console.print(f"[green]✓[/] {title} [dim]{step.seconds:.1f} s[/]")


def default_reporter() -> Reporter:
    """Return the reporter for stderr: live in a terminal, plain lines otherwise."""
    return TerminalReporter() if sys.stderr.isatty() else Reporter()
