"""What is said while something runs: how far it is, how long the rest takes. Without a terminal, as in CI."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vfu_dev import logs
from vfu_dev.device import NO_BAR, Region
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.lab import progress as move_progress
from vfu_dev.logs import SlowWork
from vfu_dev.series import progress as series_progress
from vfu_dev.series.progress import RunProgress
from vfu_dev.series.rows import COMPLETED, Row
from vfu_dev.workload.splitmix import fill_words

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


def test_slow_work_says_percent_and_time_left_and_quick_work_nothing() -> None:
    said: list[str] = []
    clock = Clock()
    work = SlowWork("filling", 100, said.append, clock.monotonic)
    for _ in range(10):
        clock.now += 1
        work.add(10)
    assert said[0] == "filling: 20 %, about 8 s left"
    assert [text.split()[1] for text in said] == ["20", "40", "60", "80"]
    quick = SlowWork("filling", 100, said.append, clock.monotonic)
    quick.add(50)
    assert len(said) == 4


def test_a_silent_phase_says_that_it_goes_on(clock: Clock) -> None:
    """Once the last line is 5 s old; the test is the pulse."""
    out = io.StringIO()
    with move_progress.Progress(Console(file=out, width=200)) as progress:
        progress("phase", {"text": "waiting for the guest"})
        progress._over.set()
        for _ in range(12):
            clock.now += 1
            progress._break_silence()
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines[1:]] == [
        "  waiting for the guest: 5 s so far",
        "  waiting for the guest: 10 s so far",
    ]


def test_a_migration_that_does_not_converge_has_no_time_left(clock: Clock) -> None:
    out = io.StringIO()
    with move_progress.Progress(Console(file=out, width=200)) as progress:
        progress("phase", {"text": "migrating"})
        for converging in (True, False):
            progress("convergence", {"text": "sentence", "converging": converging})
            for sent in (10, 20):
                clock.now += 3
                progress("sample", sample(sent, 58))
    assert out.getvalue().count("left: RAM") == 1


def test_a_large_memory_says_how_far_its_fill_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of all memories together; the content is that of one fill."""
    monkeypatch.setattr(logs, "SLOW_SECONDS", 0.0)
    more = {"more": Region(NO_BAR, size_bytes=8 * MIB)}
    with caplog.at_level(logging.INFO, "vfu_dev"):
        device = ReferenceDevice("big", memory_bytes=24 * MIB, fill_seed=7, more=more)
    assert [line.partition(",")[0] for line in caplog.messages] == [
        f"big: filling memory: {share} %" for share in (25, 50, 75)
    ]
    whole = np.zeros(24 * MIB // 8, dtype=np.uint64)
    fill_words(whole, 7)
    assert np.array_equal(device.memories[0].words.ravel(), whole)
    device.close()
