"""What one device's migrations count and measure while they run; `metrics`, `status` and `top` read it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from itertools import islice

from vfu_dev.figures import DOWNTIME_EDGES_SECONDS, MMIO_EDGES_SECONDS, Histogram, Sample, Totals
from vfu_dev.migration.forecast import Forecast, Forecaster
from vfu_dev.migration.save import SaveCounters
from vfu_dev.uapi import DeviceState

# Five minutes at the usual ten a second.
SAMPLES_KEPT = 3000

_RUNNING = frozenset({DeviceState.RUNNING, DeviceState.PRE_COPY})


class Observer:
    """The figures of one device's migrations. The engine tells it what happens; nothing here changes a thing.

    Attributes:
        arcs: how often each change of state happened.
        entered: when the present state was entered, Unix time.
        samples: the most recent ones; `sampled` counts all there ever were.
        forecast: as of the last sample; empty when no migration runs.
        last_*: of the last outgoing migration that was read to its end and went on to STOP; the prediction is
            that of when the device stopped.
    """

    def __init__(self) -> None:
        self.totals = Totals()
        self._session = SaveCounters()  # of the session under way, not in `totals` yet
        self.arcs: dict[tuple[DeviceState, DeviceState], int] = {}
        self.entered = time.time()
        self.read_seconds = Histogram(MMIO_EDGES_SECONDS)
        self.stop_copy_seconds = Histogram(DOWNTIME_EDGES_SECONDS)
        self.downtime_seconds = Histogram(DOWNTIME_EDGES_SECONDS)
        self.forecaster = Forecaster()
        self.forecast = Forecast()
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_KEPT)
        self.sampled = 0
        self.last_stop_copy_seconds: float | None = None
        self.last_downtime_seconds: float | None = None
        self.last_predicted_downtime_seconds: float | None = None
        self._stop_copy_ns = 0  # STOP_COPY since
        self._stop_copy_seconds: float | None = None

    def state_changed(self, origin: DeviceState, target: DeviceState, ago_ns: int = 0) -> None:
        """Count an arc, or the jump of a reset.

        Args: ago_ns: how long ago that was; longer than no time for an arc that stopped the device.
        """
        self.arcs[origin, target] = self.arcs.get((origin, target), 0) + 1
        self.entered = time.time() - ago_ns / 1e9
        now = time.perf_counter_ns() - ago_ns
        if origin in _RUNNING and target not in _RUNNING:
            # PRE_COPY_P2P and RUNNING_P2P are where a client with several devices begins to stop them.
            self.forecaster.stop(now)
        if target is DeviceState.STOP_COPY:
            self._stop_copy_ns = now

    @property
    def predicted_seconds(self) -> float | None:
        """The downtime predicted when the device stopped; None when it was not stopped in a migration."""
        return self.forecaster.predicted_seconds

    def sums(self) -> Totals:
        """Return a copy of the totals, with what the session under way has counted."""
        totals, session = self.totals, self._session
        return replace(
            totals,
            passes=totals.passes + session.passes,
            pages_sent=totals.pages_sent + session.pages_sent,
            pages_resent=totals.pages_resent + session.pages_resent,
            zero_pages=totals.zero_pages + session.zero_pages,
        )

    def save_began(self, session: SaveCounters) -> None:
        """Count an outgoing migration, which counts its pages in `session` until `save_ended`."""
        self.totals.saves_started += 1
        self._session = session
        self._stop_copy_seconds = None
        self.forecaster.begin()

    def read(self, asked: int, stored: int, began_ns: int, initial_bytes: int | None) -> None:
        """Count a read of the stream that began at `began_ns`, of the clock `time.perf_counter_ns`.

        Args: initial_bytes: of what was stored, in PRE_COPY; None: it was in STOP_COPY.
        """
        now = time.perf_counter_ns()
        sent = self.totals.sent_bytes
        if initial_bytes is None:
            sent["stop_copy"] += stored
        else:
            sent["pre_copy_initial"] += initial_bytes
            sent["pre_copy_dirty"] += stored - initial_bytes
        self.read_seconds.observe_ns(now - began_ns)
        self.forecaster.read(asked, stored, began_ns, now)

    def asked(self, left_bytes: int) -> None:
        """Note that the client asked how much is left in PRE_COPY."""
        self.forecaster.ask(left_bytes, by_client=True)

    def all_read(self) -> None:
        """Note that the stream was read to its end."""
        self._stop_copy_seconds = (time.perf_counter_ns() - self._stop_copy_ns) / 1e9

    def save_ended(self, result: str) -> None:
        """Count the end of an outgoing migration, one of SAVE_RESULTS."""
        self.totals, self._session = self.sums(), SaveCounters()
        self.totals.saves[result] += 1
        self.forecast = Forecast()

    def went_on(self) -> None:
        """Note that the client went on to STOP after the stream was read to its end.

        How the migration ends is open until it does something else: it may come back to RUNNING.
        """
        self.forecast = Forecast()
        if self._stop_copy_seconds is None:
            return
        self.last_predicted_downtime_seconds = self.predicted_seconds
        downtime = self.forecaster.end(time.perf_counter_ns())
        self.stop_copy_seconds.observe(self._stop_copy_seconds)
        self.downtime_seconds.observe(downtime)
        self.last_stop_copy_seconds = self._stop_copy_seconds
        self.last_downtime_seconds = downtime

    def resume_ended(self, result: str) -> None:
        """Count the end of an incoming migration, one of RESUME_RESULTS."""
        self.totals.resumes[result] += 1

    def add_sample(self, sample: Sample) -> None:
        """Keep a sample."""
        self.samples.append(sample)
        self.sampled += 1

    def samples_after(self, sequence: int, limit: int) -> tuple[int, list[Sample]]:
        """Return up to `limit` samples after number `sequence`, and the number of the last of them.

        Samples that are kept no longer are passed over; a number of the future starts from the first.
        """
        if sequence > self.sampled:
            sequence = 0
        first = max(sequence, self.sampled - len(self.samples))
        skipped = first - (self.sampled - len(self.samples))
        found = list(islice(self.samples, skipped, skipped + limit))
        return first + len(found), found
