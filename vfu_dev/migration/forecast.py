"""Does a migration converge, how long will the device stand still? The one place where rates are computed.

All figures come from what this side sees: when the client reads, what it asks, what the guest writes. The
server's own timer samples them; a query never takes a sample.

transfer rate: bytes that the client read while there was more to read, divided by the time until its next
read ended. Time in which there was nothing to read does not count: it shows nothing about the link.

dirty rate: distinct pages written in a sampling interval. A page written twice in 0.1 s costs the link
once; over a longer interval even more writes would hit the same pages, so this errs on the safe side. The
migration converges if the pages written in one downtime limit can be sent within it, and 0.1 s is of that
order.

stop-copy rate: what the client reads when it does nothing else. Before the stop QEMU sends RAM between two
reads, and sleeps to keep its bandwidth limit; both are pauses, and they end with the stop. The time between
reads without such pauses is the pace: it holds the link, the other end, and the other work of both machines.
The work of the guest and of QEMU's other threads is part of it, and ends with the stop as well.
If a pause follows every read, no pace can be measured. QEMU 10.2.2 (qemu_savevm_state_iterate) gives
a device one read of 1 MiB for each turn over the RAM, and below 10 MiB/s one each 100 ms. The device's own
share of a read, the time in the callback (`service`), can always be measured: the whole path takes
PATH_FACTOR times that. `Forecaster.stop_copy_cost` says which of the two counts.

predicted downtime: the bytes left at that rate, a last scan of memory that the guest maps, and
OVERHEAD_SECONDS for everything else. It covers this device alone: QEMU stops, saves and resumes the devices
of a VM one after the other, and the device cannot see the RAM that QEMU sends meanwhile.

converging: true while the client reads faster than the guest writes. False only after a full round of the
client: it asked how much is left (MIG_GET_PRECOPY_INFO), read that many bytes, asked again, and no less was
left. QEMU asks when it considers stopping. While it still has RAM to send it does not ask, and a low transfer
rate then means that QEMU is busy, not that the link is slow: the answer is None.

The constants below, and those of `vfu_dev.migration.meters`, state the assumptions and their reasons.
docs/predictions.md compares predictions with measurements, over the moves in tests/data/moves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import NamedTuple

from vfu_dev.convergence import is_converging
from vfu_dev.memory.sending import INDEX_BYTES
from vfu_dev.migration.meters import MIN_READ_BYTES, DirtyMeter, ReadMeter, Rounds

# Both from the moves in tests/data/moves, which docs/predictions.md puts beside what they predict.
#
# Downtime of one device without the reading: the client's way to STOP_COPY and from its end, and the
# destination's last step. QEMU 10.2.2 on 2 idle cores of an AMD EPYC, with next to nothing left:
# 3.6 to 5 ms without a guest, 5.5 to 8.5 with Linux, 4.5 to 5.7 for each of four or eight devices;
# `vfu_dev.client.migrator` 1 to 2.4. It does not depend on the size: with 1 GiB the destination's end record
# and RESUMING -> STOP took 0.26 ms; they only fold hashes taken before.
OVERHEAD_SECONDS = 0.006
# Time of the whole path per byte, as a multiple of the callback's (`ReadMeter.service_cost`): 6 to 8
# on these 2 cores, 4.6 to 5.7 on one of them, 2.8 to 3.4 for mapped memory, which the callback also copies.
PATH_FACTOR = 6.0
# A steady pace slower than this multiple of the path is that of a link. The guest's own work made a steady
# pace up to 1.65 times as slow as the path, on one core.
_SLOW_LINK = 1.7
# An irregular pace up to this factor slower than the path measures the same thing on a busy machine. A slower
# one has pauses after most reads. A path this factor slower than the pace is wrong: the callback does other
# work.
_CONTRADICTION = 2.0
# What delays reads irregularly delays the rest of a stop. The overhead is scaled by pace over path up to this
# factor: with other work on these two cores both took 2 to 2.5 times as long.
_MOST_CROWDED = 2.0

# Number of earlier migrations kept; a stop-copy shorter than this teaches nothing about the path.
_REMEMBERED, _LEARNT_BYTES = 5, 8 << 20
# A prediction that may be off by more than this share, and by more than this time, is withheld.
_UNSURE_SHARE, _UNSURE_SECONDS = 0.2, 0.005


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
    converging: bool | None = None  # None: not known yet, or the client is busy with other work

    def as_dict(self) -> dict[str, float | bool | None]:
        """Return it as JSON knows it."""
        return asdict(self)


def page_stream_bytes(pages: int, page_size_bytes: int) -> int:
    """Return what `pages` cost in the stream, without the share of record headers (below 0.02 %)."""
    return pages * (page_size_bytes + INDEX_BYTES)


class _Cost(NamedTuple):
    """What a byte takes in STOP_COPY, and what is known of the machine and the link.

    Attributes:
        nanoseconds: None before the first read.
        crowded: factor by which other work delays the rest of the stop; 1 if that is not known.
        of_link: whether it is the pace of a link, or of a client that keeps a limit.
    """

    nanoseconds: float | None
    crowded: float = 1.0
    of_link: bool = False


_UNKNOWN = _Cost(None)


@dataclass
class _Stop:
    """A device that stands still: since when, what was predicted, and how it has been read since."""

    stopped_ns: int
    predicted_seconds: float | None = None
    service_cost: float | None = None
    cost: _Cost = _UNKNOWN
    first_ns: int = 0  # when the first read of STOP_COPY began
    last_ns: int = 0  # when the last read ended, one without data included
    read_bytes: int = 0


class _Learnt:
    """Estimate of a figure: the median of the assumed and the measured values, the lower of two.

    A single migration, which a stall may have spoilt, never raises it above the assumed value.
    """

    def __init__(self, assumed: float) -> None:
        self._assumed = assumed
        self._measured: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, measured: float) -> None:
        """Take in what a migration showed."""
        self._measured.append(measured)

    @property
    def value(self) -> float:
        """The figure."""
        values = sorted((self._assumed, *self._measured))
        return values[(len(values) - 1) // 2]

    @property
    def is_measured(self) -> bool:
        """Whether more than one migration agrees on it."""
        return len(self._measured) > 1


class Forecaster:
    """Rates and prediction of one device, from one migration to the next. Each method is one event.

    Attributes:
        length_bytes: stream bytes that are left, from the session's last figure minus the reads since.
        path_factor: what a byte takes on the whole path over what it takes here; measured by migrations with
            enough STOP_COPY.
        overhead_seconds: how much longer than the reading alone the device stands still, uncrowded.
    """

    def __init__(self) -> None:
        self.reads = ReadMeter()
        self.dirty = DirtyMeter()
        self.rounds = Rounds()
        self.length_bytes: int | None = None
        self.path_factor = _Learnt(PATH_FACTOR)
        self.overhead_seconds = _Learnt(OVERHEAD_SECONDS)
        self._scan_seconds = 0.0
        self._stop: _Stop | None = None

    def begin(self) -> None:
        """Forget the rates of the migration before; what it taught is what this one starts from."""
        self.reads = ReadMeter()
        self.dirty = DirtyMeter()
        self.rounds = Rounds()
        self.length_bytes = None
        self._scan_seconds = 0.0
        if self._stop is not None:  # without PRE_COPY a device stops first, and nothing was predicted
            self._stop = _Stop(self._stop.stopped_ns)

    def tell(self, length_bytes: int) -> None:
        """Take the session's figure of the bytes left."""
        self.length_bytes = length_bytes

    def ask(self, left_bytes: int, *, by_client: bool) -> None:
        """Note the bytes left: the client asked, or a sample did for a client that cannot."""
        if by_client:
            self.rounds.asked += 1
        elif self.rounds.asked:
            return
        self.rounds.ask(left_bytes)

    def sample(self, seconds: float, written_bytes: int, scan_seconds: float = 0.0) -> None:
        """End a sampling interval in PRE_COPY.

        Args:
            seconds, written_bytes: its length, and the stream bytes of pages that were written in it.
            scan_seconds: current time of a scan of all pages.
        """
        self._scan_seconds = scan_seconds
        self.dirty.note(seconds, written_bytes)
        self.reads.tick()

    def read(self, asked: int, stored: int, began_ns: int, ended_ns: int) -> None:
        """Count a read, see `ReadMeter.note`."""
        self.reads.note(asked, stored, began_ns, ended_ns)
        self.rounds.read(stored)
        if self.length_bytes is not None:
            self.length_bytes -= stored
        if self._stop is not None:
            self._stop.first_ns = self._stop.first_ns or began_ns
            self._stop.last_ns = ended_ns
            self._stop.read_bytes += stored

    def stop(self, now_ns: int) -> None:
        """Note that the device stopped: the prediction of now is compared with the measurement later."""
        _, predicted = self.estimate(surely=False)
        self._stop = _Stop(now_ns, predicted, self.reads.service_cost, self._cost())

    @property
    def predicted_seconds(self) -> float | None:
        """The downtime predicted when the device stopped; None when it was not stopped in a migration."""
        return None if self._stop is None else self._stop.predicted_seconds

    def end(self, now_ns: int) -> float:
        """Learn from a completed migration; returns its downtime in seconds."""
        stop = self._stop
        assert stop is not None, "it was not stopped"
        downtime_seconds = (now_ns - stop.stopped_ns) / 1e9
        reading_ns = stop.last_ns - stop.first_ns
        # A client that keeps a bandwidth limit pauses after the last read, too. A path that was taken for
        # slower than it is must not shorten the rest.
        foreseen_ns = stop.read_bytes * (stop.cost.nanoseconds or 0.0) if stop.cost.of_link else 0.0
        rest_seconds = downtime_seconds - max(reading_ns, foreseen_ns) / 1e9 - self._scan_seconds
        self.overhead_seconds.add(max(0.0, rest_seconds) / stop.cost.crowded)
        if stop.service_cost is not None and stop.read_bytes >= _LEARNT_BYTES:
            self.path_factor.add(reading_ns / stop.read_bytes / stop.service_cost)
        return downtime_seconds

    @property
    def stop_copy_cost(self) -> float | None:
        """Nanoseconds per byte once the client does nothing but read; None before its first read.

        A link slower than the path counts alone, and so does a pace that varies from read to read: other work
        goes on after the stop. A steady pace that is not a link's holds the guest's own work, which ends with
        the stop. There, and without a pace, the path counts.
        """
        return self._cost().nanoseconds

    def _cost(self) -> _Cost:
        reads = self.reads
        service, pace = reads.service_cost, reads.pace
        if service is None:
            return _Cost(pace, of_link=True)
        path = self.path_factor.value * service
        if pace is None:
            return _Cost(path)
        is_slow = pace > _CONTRADICTION * path
        # Unless earlier stops showed how fast the link is: then there is RAM between all reads.
        if is_slow and self.path_factor.is_measured:
            return _Cost(path)
        link = reads.link_cost
        if link is not None:
            if link > _SLOW_LINK * path:
                return _Cost(link, of_link=True)
            return _Cost(min(path, _CONTRADICTION * link))
        # Without a steady link it is the quickest reads: on a crowded machine a link is not steady.
        if is_slow:
            pace = reads.quick_cost
            if pace > _CONTRADICTION * path:
                return _Cost(pace, of_link=True)
        crowded = min(_MOST_CROWDED, max(1.0, pace / path))
        return _Cost(min(_CONTRADICTION * pace, max(pace, path)), crowded)

    def estimate(self, *, surely: bool = True) -> tuple[float | None, float | None]:
        """Return the estimated seconds in STOP_COPY and the predicted downtime, for a stop now.

        Args: surely: return None for a figure that further reads may well change.
        """
        (cost, crowded, _), length = self._cost(), self.length_bytes
        over = self.overhead_seconds.value * crowded + self._scan_seconds
        if length is None:
            return None, None
        if cost is None:  # a device with next to no state needs no read for it
            return (0.0, over) if length <= MIN_READ_BYTES else (None, None)
        seconds = max(0, length) * cost / 1e9
        if surely and not self.reads.is_settled:
            # Pauses between reads and a slow link cannot be told apart yet.
            slowest = self.reads.mean_cost
            unsure_seconds = max(_UNSURE_SECONDS, _UNSURE_SHARE * (seconds + over))
            if slowest is None or length * (slowest - cost) / 1e9 > unsure_seconds:
                return None, None
        return seconds, seconds + over

    @property
    def converging(self) -> bool | None:
        """Whether the migration converges; None when that is not known, see the module's docstring."""
        return is_converging(self.dirty.rate, self.reads.rate, stuck=self.rounds.falling is False)

    def forecast(self, initial_bytes: int | None, dirty_bytes: int | None) -> Forecast:
        """Return the current figures, with what the session has left."""
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
