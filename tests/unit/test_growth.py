"""The judge of growth: it sees a leak that is small, and no leak in noise."""

from __future__ import annotations

import os
import random
from pathlib import Path

from growthkit import LIMITS, Growth, look

MOVES = range(10, 1001, 10)


def growth(
    rss_a_move: float = 0.0, descriptor_each: int = 0, noise: int = 0, filling_bytes: int = 0
) -> Growth:
    """Return samples of a process that leaks so, over a thousand moves."""
    drawn = random.Random(1)
    found = Growth({}, filling_bytes=filling_bytes)
    for moves in MOVES:
        found.moves.append(moves)
        row = {
            "rss_bytes": round(60e6 + rss_a_move * moves + drawn.choice((0, noise))),
            "descriptors": 12 + (moves // descriptor_each if descriptor_each else 0),
            "threads": 2,
            "maps": 200 + drawn.choice((0, 1)),
            "log_bytes": 900 * moves,
        }
        found.samples.setdefault("server", []).append(row)
    return found


def test_a_small_leak_is_seen_in_noise() -> None:
    """512 bytes a move among jumps of 1 MiB; one descriptor in a hundred moves."""
    (said,) = growth(rss_a_move=512, noise=1 << 20).problems()
    assert said.startswith("server: rss_bytes +")
    (said,) = growth(descriptor_each=100).problems()
    assert said.startswith("server: descriptors +9.8")


def test_noise_and_a_warm_up_are_no_leak() -> None:
    assert growth(noise=1 << 20).problems() == []
    warming = growth()
    for moves, row in zip(warming.moves, warming.samples["server"], strict=True):
        row["rss_bytes"] += min(moves, 200) << 12
    assert warming.problems() == []


def test_what_fills_once_is_told_from_what_grows_with_each_move() -> None:
    assert growth(rss_a_move=1024, filling_bytes=1 << 20).problems() == []
    assert growth(rss_a_move=2048, filling_bytes=1 << 20).problems() != []


def test_a_log_that_floods_is_seen() -> None:
    found = growth()
    for moves, row in zip(found.moves, found.samples["server"], strict=True):
        row["log_bytes"] = 9000 * moves
    (said,) = found.problems()
    assert "log_bytes" in said


def test_what_a_process_holds_is_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 7)
    before = look(os.getpid(), tmp_path / "log")
    with (tmp_path / "log").open():
        after = look(os.getpid(), tmp_path / "log")
    assert after["descriptors"] == before["descriptors"] + 1
    assert before["log_bytes"] == 7
    assert set(before) == {*LIMITS, "log_bytes"}
    assert min(before.values()) > 0
