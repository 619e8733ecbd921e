"""Does a migration converge, how long will the device stand still? The one place where rates are computed.

Three figures decide it, and all come from what this side sees:

transfer rate: bytes that the client read while there was more to read, by the time until its next read
ended. Time in which there was nothing to read says nothing about the link.

dirty rate: distinct pages written in a sampling interval. A page written twice in 0.1 s costs the link
once; over a longer interval even more writes would hit the same pages, so this errs to the safe side. What
counts in the end is whether the pages written during a stop of the length of the downtime limit fit into
it, and 0.1 s is of that order.

stop-copy rate: what the link carries when nothing else is to be done. A client that limits its bandwidth
sends in bursts with pauses between them, and pauses no more once the device stopped (QEMU lifts the limit
then); and the guest's MMIO, which takes its share of both processes before, ends with the stop. So this is
not the mean of recent reads but, over their bytes, the speed that two thirds of them do not exceed. With
QEMU 10.2.2 over a loopback on 2 cores, in four runs of 19 to 60 MiB of STOP_COPY, the median of PRE_COPY
came to 0.78 to 1.06 times that of STOP_COPY, the third quartile to 1.02 to 1.29 times.

They are sampled by the server's own timer, never by whoever looks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass
from itertools import accumulate

from vfu_dev.migration.stream import INDEX_BYTES

# Rates are averages over so many samples: a second.
_AVERAGED = 10
# Reads that the stop-copy rate is taken from (64 MiB at 1 MiB a read), and the share of bytes below it.
_READS = 64
_BURST_QUANTILE = 2 / 3

# What a first migration is assumed to take besides reading: QEMU 10.2.2 took 8 to 11 ms in four runs of a VM
# without vCPUs.
OVERHEAD_SECONDS = 0.01


class ReadMeter:
    """How fast the client reads, told by the reads of one migration."""

    def __init__(self) -> None:
        # Bytes, and nanoseconds they took, for each of the last sampling intervals that had any.
        self._busy: deque[list[int]] = deque([[0, 0]], maxlen=_AVERAGED)
        self._intervals: deque[tuple[int, int]] = deque(maxlen=_READS)
        self._open_bytes = 0  # of the read before, when it left something to read
        self._ended_ns = 0

    def note(self, asked: int, stored: int, ended_ns: int) -> None:
        """Count one read: `stored` of the `asked` bytes, done at `ended_ns` of a monotonic clock."""
        if self._open_bytes:
            self._close(ended_ns - self._ended_ns)
        self._open_bytes = stored if stored == asked else 0
        self._ended_ns = ended_ns

    def _close(self, duration_ns: int) -> None:
        self._busy[-1][0] += self._open_bytes
        self._busy[-1][1] += duration_ns
        self._intervals.append((self._open_bytes, max(1, duration_ns)))

    def tick(self) -> None:
        """End a sampling interval; one in which nothing could be read leaves the rate as it was."""
        if self._busy[-1][1]:
            self._busy.append([0, 0])

    @property
    def rate(self) -> float | None:
        """Bytes a second over the last second that had something to read; None before the second read."""
        duration_ns = sum(duration for _, duration in self._busy)
        return sum(count for count, _ in self._busy) / duration_ns * 1e9 if duration_ns else None

    @property
    def burst_rate(self) -> float | None:
        """Bytes a second that two thirds of the recent bytes do not exceed; None before the second read."""
        if not self._intervals:
            return None
        rates = sorted((count / duration, count) for count, duration in self._intervals)
        below = list(accumulate(count for _, count in rates))
        return rates[bisect_left(below, below[-1] * _BURST_QUANTILE)][0] * 1e9


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
    converging: bool | None = None  # None until it can be told

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
        overhead_seconds: how much longer than the reading alone the device stood still in earlier migrations;
            the most recent counts half. `OVERHEAD_SECONDS` before the first.
    """

    def __init__(self) -> None:
        self.reads = ReadMeter()
        self.dirty = DirtyMeter()
        self.length_bytes: int | None = None
        self.overhead_seconds = OVERHEAD_SECONDS

    def begin(self) -> None:
        """Forget the rates of the migration before; its overhead is what this one starts from."""
        self.reads = ReadMeter()
        self.dirty = DirtyMeter()
        self.length_bytes = None

    def learn(self, estimated_seconds: float, downtime_seconds: float) -> None:
        """Compare what reading was estimated to take with how long the device stood still."""
        over = max(0.0, downtime_seconds - estimated_seconds)
        self.overhead_seconds = (self.overhead_seconds + over) / 2

    def estimate(self) -> tuple[float | None, float | None]:
        """Return the estimated seconds in STOP_COPY and the predicted downtime, for a stop now."""
        rate = self.reads.burst_rate
        if rate is None or self.length_bytes is None:
            return None, None
        seconds = self.length_bytes / rate
        return seconds, seconds + self.overhead_seconds

    def forecast(self, initial_bytes: int | None, dirty_bytes: int | None) -> Forecast:
        """Return the present figures around what the session says is left."""
        transfer, dirty = self.reads.rate, self.dirty.rate
        estimated, predicted = self.estimate()
        return Forecast(
            initial_bytes=initial_bytes,
            dirty_bytes=dirty_bytes,
            stop_copy_length_bytes=self.length_bytes,
            dirty_rate_bytes_per_second=dirty,
            transfer_rate_bytes_per_second=transfer,
            stop_copy_rate_bytes_per_second=self.reads.burst_rate,
            estimated_stop_copy_seconds=estimated,
            predicted_downtime_seconds=predicted,
            converging=None if transfer is None or dirty is None else transfer > dirty,
        )
