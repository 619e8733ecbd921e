"""Takes a sample of a running migration ten times a second, by the clock of the device's owner."""

from __future__ import annotations

import time

from vfu_dev.convergence import WINDOW_SECONDS
from vfu_dev.figures import Sample
from vfu_dev.migration.engine import Migration
from vfu_dev.migration.forecast import Forecast, page_stream_bytes
from vfu_dev.migration.fsm import PRE_COPY_GROUP
from vfu_dev.uapi import DeviceState

SAMPLE_SECONDS = WINDOW_SECONDS  # QEMU checks its bandwidth at the same interval
# A sample scans all pages and may take this share of the time: a big memory is scanned less often.
_MAX_SHARE = 0.02

_SAMPLED = PRE_COPY_GROUP | {DeviceState.STOP_COPY, DeviceState.RESUMING}


class Sampler:
    """Samples one device's migration; the loop asks `timeout` and calls `poll` when it likes.

    Args: interval_seconds: between two samples.
    """

    def __init__(self, migration: Migration, interval_seconds: float = SAMPLE_SECONDS) -> None:
        self._migration = migration
        self._interval = interval_seconds
        self._state = migration.state
        self._sampled = 0.0  # when, of time.monotonic
        self._due = 0.0
        self._transferred = 0
        self._saves = self._resumes = 0

    def timeout(self) -> float | None:
        """Return the seconds until the next sample, None when there is nothing to sample."""
        state = self._migration.state
        if state is not self._state:
            return 0.0
        if state not in _SAMPLED:
            return None
        return max(0.0, self._due - time.monotonic())

    def poll(self) -> None:
        """Take a sample if one is due: after each interval, and whenever the state has changed."""
        state = self._migration.state
        if state not in _SAMPLED and self._state not in _SAMPLED:
            self._state = state
            return
        now = time.monotonic()
        if now < self._due and state is self._state:
            return
        began = time.thread_time()
        self._sample(state, now)
        # Time that this thread had the processor: what others took meanwhile is not the sample's.
        cost_seconds = time.thread_time() - began
        self._due = now + max(self._interval, cost_seconds / _MAX_SHARE)
        self._state = state

    def _scan_seconds(self) -> float:
        """Return the time of a scan of all mapped memory, from all scans so far; a stop begins with one."""
        return sum(
            memory.page_count * memory.scans.ns / 1e9 / memory.scans.pages
            for memory in self._migration.contents.memories
            if memory.mapped and memory.scans.pages
        )

    def _sample(self, state: DeviceState, now: float) -> None:
        migration, observer = self._migration, self._migration.observer
        forecaster = observer.forecaster
        initial = dirty = None
        passes = 0
        if migration.has_precopy_info:
            info = migration.precopy_info()  # scans pages written since the previous scan
            initial, dirty = info.initial_bytes, info.dirty_bytes
            written = sum(
                page_stream_bytes(memory.pages.take_recent(), memory.page_size_bytes)
                for memory in migration.contents.memories
            )
            # The first scan of a session finds everything written since the previous session.
            if observer.totals.saves_started == self._saves:
                forecaster.sample(now - self._sampled, written, self._scan_seconds())
            # For a client that cannot ask: reading as many bytes as were left counts as asking.
            forecaster.ask(info.initial_bytes + info.dirty_bytes, by_client=False)
            self._saves = observer.totals.saves_started
        if state is DeviceState.RESUMING:
            observer.forecast = Forecast()
            transferred = migration.received()
            if observer.totals.resumes_started == self._resumes and self._state is state:
                rate = (transferred - self._transferred) / (now - self._sampled)
                observer.forecast.transfer_rate_bytes_per_second = rate
            self._resumes = observer.totals.resumes_started
        else:
            transferred, passes = migration.sent()
            if state in _SAMPLED:
                observer.forecast = forecaster.forecast(initial, dirty)
            else:
                observer.forecast = Forecast()
        figures = observer.forecast
        observer.add_sample(
            Sample(
                time=time.time(),
                state=state.name,
                initial_bytes=figures.initial_bytes,
                dirty_bytes=figures.dirty_bytes,
                stop_copy_length_bytes=figures.stop_copy_length_bytes,
                transferred_bytes=transferred,
                dirty_rate_bytes_per_second=figures.dirty_rate_bytes_per_second,
                transfer_rate_bytes_per_second=figures.transfer_rate_bytes_per_second,
                predicted_downtime_seconds=figures.predicted_downtime_seconds,
                passes=passes,
            )
        )
        self._transferred = transferred
        self._sampled = now
