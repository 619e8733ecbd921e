"""Measurements of one migration, from its reads, size queries and writes: rates, costs, rounds.

`vfu_dev.migration.forecast` predicts from them, and explains what each is for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from itertools import accumulate

# Rates are averages over this number of samples: one second.
_AVERAGED = 10
# Less reading time than this gives no rate: the first reads go into empty buffers.
_RATE_NS = 20e6
# Reads that costs are taken from: 64 MiB at 1 MiB a read.
_READS = 64
# Ignore smaller reads: their cost per byte is mostly fixed overhead.
MIN_READ_BYTES = 64 << 10
# Skip the first 3 intervals between reads: buffers are empty, and no bandwidth limit has taken effect yet.
_FIRST_READS = 3
# A pace is the mean of at least _PACE_READS intervals between reads. An interval longer than _PAUSE times the
# first quartile was a pause: waiting for a processor makes some reads two or three times as long, repeatedly.
_PACE_READS, _PAUSE, _PACE_QUANTILE = 4, 3.0, 0.25
# Reads have the pace of a link when at least _STEADY_READS intervals agree within a factor of _ALIKE, and at
# most _QUICKER_SHARE of the bytes were faster.
_STEADY_READS, _ALIKE, _QUICKER_SHARE = 6, 1.5, 0.2
# QEMU (BUFFER_DELAY of migration.c) wakes up every 100 ms to spend its bandwidth, in blocks of 1 MiB
# (VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE): intervals of that length, or a multiple, are those of its clock.
_CLOCK_NS, _CLOCK_SLACK, _CLOCK_BYTES = 100e6, 0.08, 1 << 20

# A round that leaves more than this share of the one before made no progress.
_PROGRESS = 0.9
# Quantile of the intervals that counts as the quickest reads.
_QUICK_QUANTILE = 0.15
# Quantile of the callback's own time: reads that nothing interrupted.
_SERVICE_QUANTILE = 0.25


def _quantile(values: Iterable[tuple[float, int]], share: float) -> float | None:
    """Return the cost that `share` of the bytes do not exceed, from (cost, bytes); None without any."""
    ordered = sorted(values)
    if not ordered:
        return None
    below = list(accumulate(count for _, count in ordered))
    return ordered[bisect_left(below, below[-1] * share)][0]


def _bytes(costs: list[tuple[float, int]]) -> int:
    return sum(count for _, count in costs)


def _mean(costs: list[tuple[float, int]]) -> float:
    return sum(cost * count for cost, count in costs) / _bytes(costs)


class ReadMeter:
    """How fast the client reads in one migration. Costs are nanoseconds per byte."""

    def __init__(self) -> None:
        # Bytes, and nanoseconds they took, for each of the last sampling intervals that had any.
        self._busy: deque[list[int]] = deque([[0, 0]], maxlen=_AVERAGED)
        self._intervals: deque[tuple[int, int]] = deque(maxlen=_READS)
        self._services: deque[tuple[int, int]] = deque(maxlen=_READS)
        self._open_bytes = 0  # of the read before, when it left something to read
        self._ended_ns = 0
        self._count = 0  # of intervals
        self._served = 0  # how many went into `_services`

    def note(self, asked: int, stored: int, began_ns: int, ended_ns: int) -> None:
        """Count one read: `stored` of `asked` bytes, from `began_ns` to `ended_ns` of a monotonic clock."""
        if self._open_bytes:
            self._close(ended_ns - self._ended_ns)
        self._open_bytes = stored if stored == asked else 0
        self._ended_ns = ended_ns
        if stored >= MIN_READ_BYTES:
            self._served += 1
            if self._served == 2:  # the first touches everything for the first time: better than nothing
                self._services.clear()
            self._services.append((stored, max(1, ended_ns - began_ns)))

    def _close(self, duration_ns: int) -> None:
        self._busy[-1][0] += self._open_bytes
        self._busy[-1][1] += duration_ns
        self._count += 1
        if self._count > _FIRST_READS:
            self._intervals.append((self._open_bytes, max(1, duration_ns)))

    def tick(self) -> None:
        """End a sampling interval; one in which nothing could be read leaves the rate as it was."""
        if self._busy[-1][1]:
            self._busy.append([0, 0])

    @property
    def rate(self) -> float | None:
        """Bytes a second over the last second that had something to read; None before there was enough."""
        duration_ns = sum(duration for _, duration in self._busy)
        if duration_ns < _RATE_NS:
            return None
        return sum(count for count, _ in self._busy) / duration_ns * 1e9

    @property
    def mean_cost(self) -> float | None:
        """Nanoseconds a byte of `rate`, as soon as there was any."""
        count, duration = sum(one[0] for one in self._busy), sum(one[1] for one in self._busy)
        return duration / count if count else None

    @property
    def service_cost(self) -> float | None:
        """What a byte costs this side, in the quicker quarter of the recent reads; None before the first."""
        return _quantile(((ns / count, count) for count, ns in self._services), _SERVICE_QUANTILE)

    @property
    def pace(self) -> float | None:
        """What a byte takes from read to read without pauses; None of too few reads, and for QEMU's clock."""
        costs = self._costs()
        quick = _quantile(costs, _PACE_QUANTILE)
        if quick is None or len(costs) < _PACE_READS:
            return None
        taken = [one for one in costs if one[0] <= _PAUSE * quick]
        turns = _mean(taken) * _CLOCK_BYTES / _CLOCK_NS
        of_clock = round(turns) > 0 and abs(turns - round(turns)) <= _CLOCK_SLACK
        return None if of_clock and all(count == _CLOCK_BYTES for _, count in taken) else _mean(taken)

    @property
    def link_cost(self) -> float | None:
        """What a byte takes where most reads take the same and few take less: on a link; None without one."""
        costs = self._costs()
        middle = _quantile(costs, 0.5)
        if middle is None:
            return None
        quicker = [one for one in costs if _ALIKE * one[0] < middle]
        alike = [one for one in costs if middle <= _ALIKE * one[0] and one[0] <= _ALIKE * middle]
        is_steady = len(alike) >= _STEADY_READS and _bytes(quicker) <= _QUICKER_SHARE * _bytes(costs)
        return _mean(alike) if is_steady else None

    @property
    def quick_cost(self) -> float:
        """What a byte takes from read to read where these follow each other most quickly; 0.0 without any."""
        costs = self._costs()
        quick = _quantile(costs, _QUICK_QUANTILE)
        return 0.0 if quick is None else _mean([one for one in costs if one[0] <= 2 * quick])

    @property
    def is_settled(self) -> bool:
        """Whether there were reads enough to tell a link from pauses."""
        return len(self._intervals) >= _STEADY_READS

    def _costs(self) -> list[tuple[float, int]]:
        return [(ns / count, count) for count, ns in self._intervals]


class Rounds:
    """Do the bytes left decrease from one round of the client to the next?

    A round begins when the client asks how much is left, and is over when it has read as much and asks again.

    Attributes:
        asked: how often it asked in this migration.
        falling: whether the last round left less than it began with; None before the first is over.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.falling: bool | None = None
        self._read_bytes = 0
        self._left_bytes: int | None = None

    def read(self, stored: int) -> None:
        """Count a read."""
        self._read_bytes += stored

    def ask(self, left_bytes: int) -> None:
        """Note the answer to a size query. A query before the first read begins no round."""
        if self._left_bytes is None:
            if not self._read_bytes:
                return
        elif self._read_bytes < self._left_bytes:
            return
        else:
            self.falling = left_bytes <= _PROGRESS * self._left_bytes
        self._left_bytes, self._read_bytes = left_bytes, 0


class DirtyMeter:
    """Distinct pages written a second, over the last second."""

    def __init__(self) -> None:
        self._windows: deque[tuple[float, int]] = deque(maxlen=_AVERAGED)

    def note(self, seconds: float, stream_bytes: int) -> None:
        """Count what was written in one interval."""
        self._windows.append((seconds, stream_bytes))

    @property
    def rate(self) -> float | None:
        """Stream bytes a second; None before the first interval."""
        seconds = sum(seconds for seconds, _ in self._windows)
        return sum(count for _, count in self._windows) / seconds if seconds else None
