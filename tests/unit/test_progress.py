"""What is said while something runs: how far it is, how long the rest takes. Without a terminal, as in CI."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from vfu_dev.lab import progress as move_progress
from vfu_dev.series import progress as series_progress
from vfu_dev.series.progress import RunProgress
from vfu_dev.series.rows import COMPLETED, Row

MIB = 1 << 20


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock of its own into both modules."""
    made = Clock()
    for module in (move_progress, series_progress):
        monkeypatch.setattr(module, "time", made)
    return made


def sample(sent: int, left: int) -> dict[str, Any]:
    """Return a row as the lab samples it, one device among it."""
    return {
        "status": "active",
        "qemu": {"ram": {"transferred": sent * MIB, "remaining": left * MIB}},
        "source": [{"state": "PRE_COPY", "initial_bytes": 2 * MIB, "dirty_bytes": 0}],
        "destination": [{"state": "RESUMING"}],
    }


def test_a_move_says_how_far_it_is(clock: Clock) -> None:
    """Of RAM and devices together, at the pace of the last seconds; a new phase begins anew."""
    out = io.StringIO()
    with move_progress.Progress(Console(file=out, width=200)) as progress:
        progress("phase", {"text": "migrating"})
        for sent in (10, 20, 30):
            clock.now += 3
            progress("sample", sample(sent, 68 - sent))
        progress("phase", {"text": "moved"})
        clock.now += 3
        progress("sample", sample(68, 0))
    lines = out.getvalue().splitlines()
    assert "active: RAM left" in lines[1], "one sample is no pace"
    assert "active, 29 %, about 15 s left: RAM left 48 MiB" in lines[2]
    assert "active, 43 %, about 12 s left: RAM left 38 MiB" in lines[3]
    assert "active: RAM left" in lines[5]


def test_a_series_says_each_tenth_of_the_way(clock: Clock) -> None:
    out = io.StringIO()
    with RunProgress(Console(file=out, width=200), "steady") as progress:
        progress("plan", {"points": 1, "moves": 20, "done": 0})
        for number in range(20):
            clock.now += 2
            progress("move", {"row": Row("all", number, 0.0, COMPLETED, {"downtime_ms": 8.0})})
    told = re.findall(r"\((\d+ %, about \S+ \S+ left)\)", out.getvalue())
    assert len(told) == 9
    assert told[0] == "10 %, about 36 s left"
