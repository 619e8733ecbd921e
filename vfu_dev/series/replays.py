"""Which moves of a point could not keep to the profile that its devices replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfu_dev.lab.judge import broken_replays
from vfu_dev.lab.result import MigrationResult

# What a server counts from its start, through all its moves.
_COUNTS = ("calls", "late_calls", "late_seconds", "overshoot_bytes")

Replay = Mapping[str, Any]


class Replays:
    """Follows the servers of a VM that moves back and forth.

    Attributes:
        not_kept: of each move that did not keep to the profile: `move`, its number, and `text`: which device,
            on which side, and what its calls took more, or its state needed more.
    """

    def __init__(self) -> None:
        self.not_kept: list[dict[str, Any]] = []
        self._before: list[Replay | None] = []  # what the source's servers had counted before the move

    def take(self, number: int, result: MigrationResult, moved: bool) -> None:
        """Take the result of a move, as collected; `moved`: the destination is the next source."""
        after: list[Replay | None] = [
            device.replay_destination if moved else device.replay_source for device in result.devices
        ]
        for device, before in zip(result.devices, self._before, strict=False):
            device.replay_source = _since(device.replay_source, before)
        if texts := broken_replays(result):
            self.not_kept.append({"move": number, "text": "; ".join(texts)})
        self._before = after

    def forget(self) -> None:
        """All servers are new."""
        self._before = []


def _since(replay: dict[str, Any] | None, before: Replay | None) -> dict[str, Any] | None:
    """Return what a replay counted since it was `before`."""
    if replay is None or before is None:
        return replay
    counts = {name: replay[name] - before[name] for name in _COUNTS}
    return {**replay, **counts, "kept": not counts["late_calls"] and not counts["overshoot_bytes"]}
