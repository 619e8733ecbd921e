"""When the writes of a load are due: how many until a moment, and the moment of a write; in whole ns.

Both are exact: a steady rate of r writes a second has floor(r * t) writes until t, however time is sliced.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

import numpy as np

from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES, Burst, Workload
from vfu_dev.workload.trace import Trace

NS = 1_000_000_000


class Schedule(Protocol):
    """The writes of one load over its own time, which begins at 0 ns."""

    def count(self, time_ns: int) -> int:
        """Return how many writes are due until then; never falls."""

    def when(self, writes: int) -> int | None:
        """Return the first moment at which that number (at least 1) is due; None for never."""


class Never:
    """Nothing is ever due."""

    def count(self, time_ns: int) -> int:
        """Return 0."""
        return 0

    def when(self, writes: int) -> int | None:
        """Return None."""
        return None


class Steady:
    """A rate (writes a second, above 0), in bursts or not."""

    def __init__(self, rate: Fraction, burst: Burst | None = None) -> None:
        self._period = self._on = 1
        if burst is not None:
            self._period = round(burst.period_seconds * NS)
            self._on = max(1, min(self._period, round(burst.duty * self._period)))
        # While a burst lasts it makes up for the pause.
        per_ns = rate * self._period / (self._on * NS)
        self._up, self._down = per_ns.numerator, per_ns.denominator

    def count(self, time_ns: int) -> int:
        """Return the whole writes in the time that bursts lasted until then."""
        if self._on == self._period:
            active = time_ns
        else:
            periods, rest = divmod(time_ns, self._period)
            active = periods * self._on + min(rest, self._on)
        return active * self._up // self._down

    def when(self, writes: int) -> int:
        """Return the moment of a write."""
        active = -(-writes * self._down // self._up)
        if self._on == self._period:
            return active
        periods, rest = divmod(active - 1, self._on)
        return periods * self._period + rest + 1


class Recorded:
    """What a trace says, round after round."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def count(self, time_ns: int) -> int:
        """Return the rows up to then."""
        rounds, rest = divmod(time_ns, self._trace.round_ns)
        return rounds * len(self._trace) + int(np.searchsorted(self._trace.times, rest, side="right"))

    def when(self, writes: int) -> int:
        """Return the time of a row."""
        rounds, row = divmod(writes - 1, len(self._trace))
        return rounds * self._trace.round_ns + int(self._trace.times[row])


def schedule_of(spec: Workload, page_bytes: int = DEFAULT_PAGE_BYTES, trace: Trace | None = None) -> Schedule:
    """Return the timeline of a load without phases.

    Args: trace: what `spec.trace` names, when it was read already.
    Raises: ConfigError: the file cannot be used.
    """
    if spec.trace is not None:
        return Recorded(trace or Trace.read(spec.trace))
    rate = spec.write_rate(page_bytes)
    return Steady(rate, spec.burst) if rate else Never()
