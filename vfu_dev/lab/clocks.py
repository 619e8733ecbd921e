"""The difference of the hosts' clocks, from events whose order is known.

Each pair of a cause on one host and its effect on the other is a bound of the difference; a migration that
completes has both kinds:

    the source's VM stops      before   the destination's devices leave RESUMING
    the destination's VM runs  before   the source's devices leave STOP_COPY

so the error of the difference is at most half of the downtime. The hosts are not queried for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vfu_dev.lab.result import MigrationResult

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Clocks:
    """How far the destination's clock is ahead of the source's.

    Attributes:
        ahead_seconds: the middle of what is possible; negative: it is behind.
        error_seconds: how far it may be from there, either way.
    """

    ahead_seconds: float
    error_seconds: float

    @property
    def differ(self) -> bool:
        """Whether the clocks certainly differ."""
        return abs(self.ahead_seconds) > self.error_seconds

    def to_json(self) -> dict[str, Any]:
        """Return figures and sentence."""
        return {**asdict(self), "differ": self.differ, "text": self.text}

    @property
    def text(self) -> str:
        """What was found, for people."""
        found = f"{abs(self.ahead_seconds) * 1000:.1f} ms, give or take {self.error_seconds * 1000:.1f} ms"
        if not self.differ:
            return f"the hosts' clocks may be the same: they differ by {found}"
        word = "ahead of" if self.ahead_seconds > 0 else "behind"
        return f"the destination's clock is {word} the source's by {found}"


def _last(rows: Iterable[Row], **wanted: Any) -> float:
    """Return the time of the last row with these values; before all times if there is none."""
    return max((row["time"] for row in rows if wanted.items() <= row.items()), default=-math.inf)


def compare_clocks(result: MigrationResult) -> Clocks | None:
    """Return the difference from the events of a completed migration; None: it has too few."""
    if result.qemu.status != "completed" or not result.devices:
        return None
    stopped = _last(result.qemu.events_source, event="STOP")
    running = _last(result.qemu.events_destination, event="RESUME")
    resumed = min(_last(one.transitions_destination, **{"from": "RESUMING"}) for one in result.devices)
    released = min(_last(one.transitions_source, **{"from": "STOP_COPY"}) for one in result.devices)
    # destination = source + ahead: an effect there is no bound from below, a cause there none from above.
    at_most, at_least = resumed - stopped, running - released
    if not (math.isfinite(at_most) and math.isfinite(at_least)):
        return None
    return Clocks((at_most + at_least) / 2, max(0.0, at_most - at_least) / 2)


def align(result: MigrationResult, clocks: Clocks) -> None:
    """Convert all times of the destination in `result` to the source's clock."""
    rows = [*result.qemu.events_destination, *result.qemu.trace_destination]
    for device in result.devices:
        rows += device.transitions_destination
    for row in rows:
        if "time" in row:
            row["time"] -= clocks.ahead_seconds
