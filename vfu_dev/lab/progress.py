"""The progress of a move for people: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vfu_dev.lab.observer import MoveEvent, remaining_bytes
from vfu_dev.sizes import format_duration, format_left, format_size

# Without a terminal: at most one line in this number of seconds, besides phases, and at least one in that.
PLAIN_SECONDS = 2.0
SILENT_SECONDS = 5.0
# A read-back that takes longer is announced.
LONG_SECONDS = 10.0
# The pace is taken over this number of samples, about two seconds.
PACE_SAMPLES = 40
# QEMU's words for a migration under way.
MOVING = ("setup", "active", "device")


def _sent(row: dict[str, Any]) -> float:
    """Return what the migration has sent, RAM and devices together, in bytes."""
    return float(row["qemu"].get("ram", {}).get("transferred") or 0)


def _size(value: Any) -> str:
    return format_size(value) if isinstance(value, int) else "-"


def start_pulse(beat: Callable[[], None]) -> threading.Event:
    """Call `beat` once a second in a thread, until the returned event is set."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(1.0):
            beat()

    threading.Thread(target=run, daemon=True).start()
    return over


class Progress:
    """Observes a Lab; a context manager around the run. `quiet` shows nothing."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._live: Live | None = None
        self._phase = ""
        self._row: dict[str, Any] | None = None
        self._convergence: str | None = None
        self._is_stuck = False
        self._verify: tuple[int, int] | None = None
        self._verify_from = 0.0
        self._warned = False
        self._moved: deque[tuple[float, float]] = deque(maxlen=PACE_SAMPLES)  # time, bytes sent so far
        self._started = time.monotonic()
        self._last_line = self._phase_from = self._started
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        elif not self._quiet:
            self._over = start_pulse(self._break_silence)
        return self

    def _break_silence(self) -> None:
        """Say that a phase goes on: a guest that boots says nothing to the lab."""
        now = time.monotonic()
        if now - self._last_line >= SILENT_SECONDS:
            self._line(f"  {self._phase}: {format_duration(now - self._phase_from)} so far")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, what: MoveEvent, data: dict[str, Any]) -> None:
        """Take one observation (`phase`, `convergence`, `sample` or `verify`)."""
        if what == "phase":
            self._phase, self._phase_from = str(data["text"]), time.monotonic()
            self._verify, self._verify_from = None, time.monotonic()
            self._moved.clear()
            self._line(self._phase, always=True)
        elif what == "convergence":
            self._convergence, self._is_stuck = str(data["text"]), data["converging"] is False
        elif what == "sample":
            self._row = data
            self._moved.append((time.monotonic(), _sent(data)))
            self._line(self._sample_text(data))
        elif what == "verify":
            self._verify = (data["compared_bytes"], data["total_bytes"])
            self._line(f"  {self._verify_text()}", always=self._warn())
        if self._live is not None:
            self._live.update(self._render())

    def _line(self, text: str, always: bool = False) -> None:
        if self._quiet or self._live is not None:
            return
        now = time.monotonic()
        if always or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            line = f"[{now - self._started:6.1f} s] {text}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _verify_left(self) -> float:
        """Return in how many seconds everything will have been read back, at the pace so far."""
        assert self._verify is not None
        done, total = self._verify
        return (time.monotonic() - self._verify_from) / done * (total - done) if done else 0.0

    def _warn(self) -> bool:
        """Say once that a read-back will take long."""
        first = not self._warned and self._verify_left() > LONG_SECONDS
        self._warned = self._warned or first
        return first

    def _verify_text(self) -> str:
        assert self._verify is not None
        done, total = self._verify
        text = f"read back {_size(done)} of {_size(total)} ({100 * done / max(total, 1):.0f} %)"
        if self._warned:
            about = format_duration(self._verify_left())
            text += f", about {about} left; Ctrl-C keeps the result of the migration"
        return text

    def _far(self, row: dict[str, Any]) -> str:
        """Return how far the migration is, and how long the rest takes at the pace of the last seconds.

        That is an estimate while the devices are written to; a migration that does not converge has none.
        """
        if len(self._moved) < 2 or row["status"] not in MOVING or self._is_stuck:
            return ""
        (before, sent_before), (now, sent) = self._moved[0], self._moved[-1]
        pace = (sent - sent_before) / (now - before) if now > before else 0.0
        return format_left(sent, sent + remaining_bytes(row), pace)

    def _sample_text(self, row: dict[str, Any]) -> str:
        far = self._far(row)
        status = f"{row['status']}, {far}" if far else row["status"]
        parts = [f"  {status}: RAM left {_size(row['qemu'].get('ram', {}).get('remaining'))}"]
        for index, device in enumerate(row["source"]):
            parts.append(
                f"vfu{index} {device.get('state', 'gone')} initial {_size(device.get('initial_bytes'))} "
                f"dirty {_size(device.get('dirty_bytes'))}"
            )
        text = "; ".join(parts)
        return f"{text}\n           {self._convergence}" if self._migrates(row) else text

    def _migrates(self, row: dict[str, Any]) -> bool:
        return self._convergence is not None and row["status"] in MOVING

    def _render(self) -> RenderableType:
        elapsed = time.monotonic() - self._started
        parts: list[RenderableType] = [Text(f"{elapsed:6.1f} s  {self._phase}")]
        if self._verify is not None:
            done, total = self._verify
            parts += [ProgressBar(total=total, completed=done, width=60), Text(self._verify_text())]
        elif self._row is not None:
            table = Table("device", "source", "destination", box=None, header_style="bold")
            for name in ("initial", "dirty", "pre-copied", "stop-copied"):
                table.add_column(name, justify="right")
            for index, (here, there) in enumerate(
                zip(self._row["source"], self._row["destination"], strict=True)
            ):
                table.add_row(
                    f"vfu{index}",
                    str(here.get("state", "gone")),
                    str(there.get("state", "gone")),
                    *(
                        _size(here.get(key))
                        for key in ("initial_bytes", "dirty_bytes", "precopy_bytes", "stop_copy_bytes")
                    ),
                )
            left = self._row["qemu"].get("ram", {}).get("remaining")
            sent, rest = _sent(self._row), remaining_bytes(self._row)
            if self._row["status"] in MOVING and sent + rest:
                parts.append(ProgressBar(total=sent + rest, completed=sent, width=60))
            far = self._far(self._row)
            status = f"{self._row['status']}, {far}" if far else self._row["status"]
            parts += [table, Text(f"QEMU: {status}, RAM left {_size(left)}")]
            if self._migrates(self._row):
                parts.append(Text(str(self._convergence), style="bold"))
        return Group(*parts)
