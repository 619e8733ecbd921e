"""The figures of a load, the same for every generator."""

from __future__ import annotations

from dataclasses import dataclass

from vfu_dev.workload.pacer import Pacer

# Below this part of what was due, the machine does not carry the load.
KEEPS_UP = 0.95


@dataclass
class WorkloadFigures:
    """What a load did so far.

    Attributes:
        asked_rate_bytes: on average, see docs/load.md.
        reached_rate_bytes: since it began, quiet time left out.
        recent_rate_bytes: in the last second or so.
        missed_writes: that were due when there was no time for them.
        carried: of the writes that were due, the part that was made; None before the first was due.
        keeps_up: whether that is 95 % or more.
        quiet_seconds: in which nothing was to be written, because a migration had the device stand still.
    """

    asked_rate_bytes: float
    reached_rate_bytes: float
    recent_rate_bytes: float
    writes: int
    written_bytes: int
    missed_writes: int
    carried: float | None
    keeps_up: bool
    seconds: float
    quiet_seconds: float

    @classmethod
    def of(
        cls,
        pacer: Pacer,
        *,
        asked_rate_bytes: float,
        recent_rate_bytes: float,
        written_bytes: int,
        seconds: float,
        quiet_seconds: float,
    ) -> WorkloadFigures:
        """Return the figures of the load behind `pacer`; what it handed out has been written."""
        carried = carried_part(pacer.taken, pacer.missed + pacer.owed)
        return cls(
            asked_rate_bytes=asked_rate_bytes,
            reached_rate_bytes=written_bytes / seconds if seconds else 0.0,
            recent_rate_bytes=recent_rate_bytes,
            writes=pacer.taken,
            written_bytes=written_bytes,
            missed_writes=pacer.missed,
            carried=carried,
            keeps_up=carried is None or carried >= KEEPS_UP,
            seconds=seconds,
            quiet_seconds=quiet_seconds,
        )


def carried_part(made: int, not_made: int) -> float | None:
    """Return which part of the writes that were due was made; None when none was due."""
    return made / (made + not_made) if made + not_made else None
