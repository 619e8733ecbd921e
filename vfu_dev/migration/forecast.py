"""Does a migration converge, how long will the device stand still? The one place where rates are computed.

All figures come from what this side sees: when the client reads, what it asks, what the guest writes. They
are sampled by the server's own timer, never by whoever looks.

transfer rate: bytes that the client read while there was more to read, by the time until its next read
ended. Time in which there was nothing to read says nothing about the link.

dirty rate: distinct pages written in a sampling interval. A page written twice in 0.1 s costs the link
once; over a longer interval even more writes would hit the same pages, so this errs to the safe side. What
counts in the end is whether the pages written during a stop of the length of the downtime limit fit into
it, and 0.1 s is of that order.

stop-copy rate: what the client reads when it does nothing else. It cannot be had from the time between two
reads alone: before the stop QEMU sends RAM in between, and sleeps to keep its bandwidth limit. QEMU 10.2.2
(qemu_savevm_state_iterate) gives a device one read of 1 MiB for each turn over the RAM, and goes on until
the limit of the present 100 ms is spent; with RAM left to send a device may get none for seconds, and below
10 MiB/s it gets one each 100 ms. Once the device stopped there is neither RAM nor a limit. What is the same
before and after is the work of both ends for a byte, and our share of that is seen in every read: the time
in the callback (`service`). The whole path took 5.6 times the quicker quarter of our callbacks, see
PATH_FACTOR. Times between reads decide only where they contradict that: a link that is slower or faster.

converging: yes while the client reads faster than the guest writes. No is said only by what the client
itself finds: it asked how much is left (MIG_GET_PRECOPY_INFO), read as much, asked again, and there was no
less. QEMU asks when it thinks of stopping. As long as it has RAM to send it does not, and a low transfer
rate then says that it is busy, not that the link is slow: neither yes nor no.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate

from vfu_dev.migration.stream import INDEX_BYTES

# Rates are averages over so many samples: a second.
_AVERAGED = 10
# Less reading than this says nothing of a rate: the first reads go into empty buffers.
_RATE_NS = 20e6
# Reads that costs are taken from: 64 MiB at 1 MiB a read.
_READS = 64
# A read has to carry so much before its cost a byte says something.
_READ_BYTES = 64 << 10

# Time of the whole path for a byte, in times of our callback's for a byte (its quicker quarter in PRE_COPY).
# Between two QEMU 10.2.2 over a loopback on 2 cores, first move of a server, 116 moves: RAM none, idle and
# heavily written, limits of 8 MiB/s to none, STOP_COPY of 5 to 88 MiB, with and without a Linux guest.
# Predicted over measured downtime: 0.90, 0.98, 1.39 (25th, 50th, 95th percentile), 0.89, 0.98, 1.19 from
# 15 MiB on; docs/metrics.md has the table.
PATH_FACTOR = 5.6
_SERVICE_QUANTILE = 0.25
# Times between reads are believed when the quickest of them contradict the path by more than this.
_CONTRADICTION = 2.0
_QUICK_QUANTILE = 0.15
# So many times between reads are left out for the same reason; a bandwidth limit has not worked yet either.
_FIRST_READS = 3
# A link's pace: so many reads take the same to within this factor, and no more than this share of bytes less.
_STEADY_READS, _ALIKE, _QUICKER_SHARE = 6, 1.5, 0.2
# QEMU (BUFFER_DELAY of migration.c) wakes up every 100 ms to spend its bandwidth: intervals of that length,
# or a multiple, are those of a clock. A longer stop-copy than _LEARNT_BYTES is needed to learn from.
_PACE_NS = 100e6
_PACE_SLACK = 0.08
_LEARNT_BYTES = 8 << 20

# What a first migration is assumed to take besides reading: QEMU's own way to STOP_COPY and from its end, and
# the destination's check of the whole state. In the moves above 4 to 9 ms, and 0.1 ms for each MiB of state.
OVERHEAD_SECONDS = 0.008
CHECK_SECONDS_PER_BYTE = 0.1e-3 / (1 << 20)

# A round that leaves more than this share of the one before made no progress.
_PROGRESS = 0.9


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
    """How fast the client reads, told by the reads of one migration. Costs are nanoseconds a byte."""

    def __init__(self) -> None:
        # Bytes, and nanoseconds they took, for each of the last sampling intervals that had any.
        self._busy: deque[list[int]] = deque([[0, 0]], maxlen=_AVERAGED)
        self._intervals: deque[tuple[int, int]] = deque(maxlen=_READS)
        self._services: deque[tuple[int, int]] = deque(maxlen=_READS)
        self._open_bytes = 0  # of the read before, when it left something to read
        self._ended_ns = 0
        self._count = 0  # of intervals
        self._warm = False  # the first read of all touches everything for the first time

    def note(self, asked: int, stored: int, began_ns: int, ended_ns: int) -> None:
        """Count one read: `stored` of `asked` bytes, from `began_ns` to `ended_ns` of a monotonic clock."""
        if self._open_bytes:
            self._close(ended_ns - self._ended_ns)
        self._open_bytes = stored if stored == asked else 0
        self._ended_ns = ended_ns
        if stored >= _READ_BYTES:
            if self._warm:
                self._services.append((stored, max(1, ended_ns - began_ns)))
            self._warm = True

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
    def service_cost(self) -> float | None:
        """What a byte costs this side, in the quicker quarter of the recent reads; None before the second."""
        return _quantile(((ns / count, count) for count, ns in self._services), _SERVICE_QUANTILE)

    @property
    def quick_cost(self) -> float | None:
        """What a byte takes from read to read, where these follow each other most quickly; None without."""
        costs = self._costs()
        quick = _quantile(costs, _QUICK_QUANTILE)
        return None if quick is None else _mean([one for one in costs if one[0] <= 2 * quick])

    @property
    def steady_cost(self) -> float | None:
        """What a byte takes from read to read where most take the same and few take less: a link's pace.

        None where there is no such pace, and where it is that of the client's clock.
        """
        costs = self._costs()
        middle = _quantile(costs, 0.5)
        if middle is None:
            return None
        quicker = [one for one in costs if _ALIKE * one[0] < middle]
        alike = [one for one in costs if middle <= _ALIKE * one[0] and one[0] <= _ALIKE * middle]
        if len(alike) < _STEADY_READS or _bytes(quicker) > _QUICKER_SHARE * _bytes(costs):
            return None
        cost = _mean(alike)
        turns = cost * _bytes(alike) / len(alike) / _PACE_NS
        return None if round(turns) and abs(turns - round(turns)) <= _PACE_SLACK else cost

    def _costs(self) -> list[tuple[float, int]]:
        return [(ns / count, count) for count, ns in self._intervals]


class Rounds:
    """Does what is left get less from one round of the client to the next?

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
        """Note that so much was left. What is asked before the first read is the size, it begins nothing."""
        if self._left_bytes is None:
            if not self._read_bytes:
                return
        elif self._read_bytes < self._left_bytes:
            return
        else:
            self.falling = left_bytes <= _PROGRESS * self._left_bytes
        self._left_bytes, self._read_bytes = left_bytes, 0


@dataclass
class Forecast:
    """The present figures of one device; all None when no migration runs."""

    initial_bytes: int | None = None
    dirty_bytes: int | None = None
    stop_copy_length_bytes: int | None = None
    dirty_rate_bytes_per_second: float | None = None
    transfer_rate_bytes_per_second: float | None = None
    stop_copy_rate_bytes_per_second: float | None = None
    estimated_stop_copy_seconds: float | None = None
    predicted_downtime_seconds: float | None = None
    converging: bool | None = None  # None: it cannot be told, yet or because the client is busy elsewhere

    def as_dict(self) -> dict[str, float | bool | None]:
        """Return it as JSON knows it."""
        return asdict(self)


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


def page_stream_bytes(pages: int, page_size_bytes: int) -> int:
    """Return what `pages` cost in the stream, the share in record headers left out (it is below 0.02 %)."""
    return pages * (page_size_bytes + INDEX_BYTES)


class Forecaster:
    """Rates and prediction of one device, from one migration to the next.

    Attributes:
        length_bytes: stream bytes that are left, as last told by the session and counted down by reads.
        path_factor: what a byte takes on the whole path over what it takes here. Measured by each
            migration with enough STOP_COPY, the most recent counts half; PATH_FACTOR before the first.
        overhead_seconds: how much longer than the reading alone the device stood still, in the same way; None
            before the first.
    """

    def __init__(self) -> None:
        self.reads = ReadMeter()
        self.dirty = DirtyMeter()
        self.rounds = Rounds()
        self.length_bytes: int | None = None
        self.path_factor = PATH_FACTOR
        self.overhead_seconds: float | None = None
        self._state_bytes = 0
        self._path_learnt = False

    def begin(self) -> None:
        """Forget the rates of the migration before; what it taught is what this one starts from."""
        self.reads = ReadMeter()
        self.dirty = DirtyMeter()
        self.rounds = Rounds()
        self.length_bytes = None
        self._state_bytes = 0

    def tell(self, length_bytes: int) -> None:
        """Take the session's word on what is left; the first in a migration is the whole state."""
        self.length_bytes = length_bytes
        self._state_bytes = max(self._state_bytes, length_bytes)

    def read(self, asked: int, stored: int, began_ns: int, ended_ns: int) -> None:
        """Count a read, see `ReadMeter.note`."""
        self.reads.note(asked, stored, began_ns, ended_ns)
        self.rounds.read(stored)
        if self.length_bytes is not None:
            self.length_bytes -= stored

    def learn(
        self, service_cost: float | None, read_bytes: int, reading_seconds: float, downtime_seconds: float
    ) -> None:
        """Take over what a migration showed.

        Args:
            service_cost: that of its PRE_COPY, see `ReadMeter`.
            read_bytes, reading_seconds: of STOP_COPY, from its first read to the end of the last with data.
            downtime_seconds: how long the device stood still.
        """
        over = max(0.0, downtime_seconds - reading_seconds)
        before = self.overhead_seconds
        self.overhead_seconds = over if before is None else (before + over) / 2
        if service_cost is not None and read_bytes >= _LEARNT_BYTES:
            factor = reading_seconds * 1e9 / read_bytes / service_cost
            self.path_factor = (self.path_factor + factor) / 2 if self._path_learnt else factor
            self._path_learnt = True

    @property
    def stop_copy_cost(self) -> float | None:
        """Nanoseconds that a byte will take when the client does nothing but read; None before it read."""
        service, steady, quick = self.reads.service_cost, self.reads.steady_cost, self.reads.quick_cost
        if service is None:
            return steady or quick
        path = self.path_factor * service
        # A slow link, unless an earlier stop showed how fast this one is. Then it is RAM between all reads.
        if steady is not None and steady > _CONTRADICTION * path and not self._path_learnt:
            return steady
        return quick if quick is not None and path > _CONTRADICTION * quick else path

    def estimate(self) -> tuple[float | None, float | None]:
        """Return the estimated seconds in STOP_COPY and the predicted downtime, for a stop now."""
        cost = self.stop_copy_cost
        if cost is None or self.length_bytes is None:
            return None, None
        seconds = max(0, self.length_bytes) * cost / 1e9
        over = self.overhead_seconds
        if over is None:
            over = OVERHEAD_SECONDS + CHECK_SECONDS_PER_BYTE * self._state_bytes
        return seconds, seconds + over

    @property
    def converging(self) -> bool | None:
        """Whether the migration converges; None when that cannot be told, see the module's text."""
        transfer, dirty = self.reads.rate, self.dirty.rate
        if transfer is None or dirty is None:
            return None
        if transfer > dirty:
            return True
        return False if self.rounds.falling is False else None

    def forecast(self, initial_bytes: int | None, dirty_bytes: int | None) -> Forecast:
        """Return the present figures around what the session says is left."""
        estimated, predicted = self.estimate()
        cost = self.stop_copy_cost
        return Forecast(
            initial_bytes=initial_bytes,
            dirty_bytes=dirty_bytes,
            stop_copy_length_bytes=self.length_bytes,
            dirty_rate_bytes_per_second=self.dirty.rate,
            transfer_rate_bytes_per_second=self.reads.rate,
            stop_copy_rate_bytes_per_second=None if cost is None else 1e9 / cost,
            estimated_stop_copy_seconds=estimated,
            predicted_downtime_seconds=predicted,
            converging=self.converging,
        )
