"""Turns a clock into writes that are due, phase by phase, and counts those for which there was no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vfu_dev.workload.schedule import NS, Schedule

# A late generator catches up on at most this much; the rest counts as missed.
CATCH_UP_NS = NS // 4


@dataclass(frozen=True)
class Run:
    """Consecutive writes of one phase: numbers `first` to `first` + `count` - 1 of its load."""

    phase: int
    first: int
    count: int


class Pacer:
    """When to write what.

    The load has a clock of its own. It follows the real one, but stands still while a generator is more than
    a quarter of a second behind: the writes of that time are missed, and what follows comes later. So the
    numbers of the writes have no gaps, and what a memory holds follows from how many were made.

    Args:
        timelines: of each phase; one for a load without phases.
        seconds: how long each phase lasts; None for a load without phases.
        start_ns: the clock now.
        first: number of the first write, for a load that goes on elsewhere; without phases only.

    Attributes:
        taken: writes handed out.
        missed: writes that were due while the load's clock stood still.
    """

    def __init__(
        self,
        timelines: Sequence[Schedule],
        seconds: Sequence[float] | None = None,
        *,
        start_ns: int,
        first: int = 0,
    ) -> None:
        self._timelines = list(timelines)
        self._durations = None if seconds is None else [round(each * NS) for each in seconds]
        ends = [] if self._durations is None else list(accumulate(self._durations))
        self._starts = [0, *ends[:-1]]
        self._cycle = ends[-1] if ends else 0
        self._next = [0] * len(self._timelines)
        self._clock = 0
        if first:
            self._next[0] = first
            self._clock = self._timelines[0].when(first) or 0
        self._origin = start_ns - self._clock
        self._target = self._clock  # as of the last `take`
        self.taken = 0
        self.missed = 0

    @property
    def owed(self) -> int:
        """Writes that were due at the last `take` and that its limit held back."""
        return self._total(self._target) - sum(self._next) if self._clock < self._target else 0

    def hold(self, ns: int) -> None:
        """Have the load's clock stand still for `ns` that passed, without missing anything."""
        self._origin += ns

    def take(self, now_ns: int, limit: int) -> list[Run]:
        """Return the writes that are due, oldest first, at most `limit`; they count as made."""
        target = self._target = self._settle(now_ns)
        runs: list[Run] = []
        left = limit
        while True:
            phase, end, own_end = self._segment(target)
            due = self._timelines[phase].count(own_end) - self._next[phase]
            if due > left:
                # Behind: the clock is where the last of them was due.
                self._add(runs, phase, left)
                moment = self._timelines[phase].when(self._next[phase]) if left else None
                if moment is not None:
                    self._clock = max(self._clock, end - (own_end - moment))
                return runs
            self._add(runs, phase, due)
            left -= due
            self._clock = end
            if end >= target:
                return runs

    def settle(self, now_ns: int) -> None:
        """Count what is missed by now, without handing anything out: for a load that ends here.

        A generator that was kept from writing just before its end would otherwise not have missed anything.
        """
        self._settle(now_ns)

    def _settle(self, now_ns: int) -> int:
        """Count what is missed; return how far the load's clock may go."""
        target = max(self._clock, now_ns - self._origin)
        late = target - self._clock - CATCH_UP_NS
        if late > 0:
            self.missed += self._total(target) - self._total(target - late)
            self._origin += late
            target -= late
        return target

    def next_ns(self) -> int | None:
        """Return the moment (of the clock given to `take`) at which the next write is due; None for never.

        With phases, of a phase in which nothing is due the moment of its end.
        """
        phase, end, own_end = self._segment(None)
        moment = self._timelines[phase].when(self._next[phase] + 1)
        if self._durations is None:
            return None if moment is None else self._origin + moment
        if moment is None or moment > own_end:
            return self._origin + end
        return self._origin + end - (own_end - moment)

    def _add(self, runs: list[Run], phase: int, count: int) -> None:
        if count:
            runs.append(Run(phase, self._next[phase], count))
            self._next[phase] += count
            self.taken += count

    def _segment(self, target: int | None) -> tuple[int, int, int]:
        """Return the phase at the load's clock, where its part until `target` ends, and that on its clock."""
        if self._durations is None:
            end = self._clock if target is None else target
            return 0, end, end
        rounds, rest = divmod(self._clock, self._cycle)
        phase = max(index for index, start in enumerate(self._starts) if start <= rest)
        begin = rounds * self._cycle + self._starts[phase]
        end = begin + self._durations[phase]
        if target is not None:
            end = min(end, target)
        return phase, end, rounds * self._durations[phase] + end - begin

    def _total(self, time_ns: int) -> int:
        """Return how many writes of all phases are due until a moment of the load's clock."""
        if self._durations is None:
            return self._timelines[0].count(time_ns)
        rounds, rest = divmod(time_ns, self._cycle)
        return sum(
            timeline.count(rounds * duration + min(max(0, rest - start), duration))
            for timeline, start, duration in zip(self._timelines, self._starts, self._durations, strict=True)
        )
