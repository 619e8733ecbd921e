"""What each move of a scenario's servers counted of their replay, which count from their start."""

from __future__ import annotations

from typing import Any

from vfu_dev.lab.result import DeviceResult, MigrationResult
from vfu_dev.series.replays import Replays
from vfu_dev.series.summary import profile_kept


def replay(calls: int, late: int = 0, seconds: float = 0.0, overshoot: int = 0) -> dict[str, Any]:
    """Return what a server says of its replay."""
    counts = {"calls": calls, "late_calls": late, "late_seconds": seconds, "overshoot_bytes": overshoot}
    return {"profile": "nic", "kept": not late and not overshoot, **counts}


def move(source: dict[str, Any] | None, destination: dict[str, Any] | None) -> MigrationResult:
    """Return the result of a move of one device."""
    device = DeviceResult(name="vfu0", replay_source=source, replay_destination=destination)
    return MigrationResult(devices=[device])


def test_a_move_is_told_what_it_was_late_itself() -> None:
    """The first one's destination is the second one's source, and the third one's that was given up."""
    replays = Replays()
    replays.take(1, move(replay(10), replay(20, 2, 0.03)), moved=True)
    replays.take(2, move(replay(30, 2, 0.03), replay(20)), moved=True)
    replays.take(3, move(replay(25, 1, 0.5), replay(3)), moved=False)
    replays.take(4, move(replay(35, 1, 0.5, 7), replay(20)), moved=True)
    assert replays.not_kept == [
        {
            "move": 1,
            "text": "vfu0's destination did not keep the profile nic: 2 of 20 calls took 30 ms more in all",
        },
        {
            "move": 3,
            "text": "vfu0's source did not keep the profile nic: 1 of 5 calls took 500 ms more in all",
        },
        {
            "move": 4,
            "text": "vfu0's source did not keep the profile nic: the device's own state needed 7 bytes more",
        },
    ]


def test_new_servers_count_from_nothing() -> None:
    replays = Replays()
    replays.take(1, move(replay(10), replay(20)), moved=True)
    replays.forget()
    replays.take(2, move(replay(5, 1, 0.25), replay(5)), moved=True)
    (lapse,) = replays.not_kept
    assert lapse["text"].endswith("1 of 5 calls took 250 ms more in all")


def test_without_a_profile_nothing_is_kept_or_not() -> None:
    replays = Replays()
    replays.take(1, move(None, None), moved=True)
    assert replays.not_kept == []
    assert profile_kept({"points": [{}, {"not_kept": []}]})
    assert not profile_kept({"points": [{}, {"not_kept": [{"move": 1, "text": ""}]}]})
