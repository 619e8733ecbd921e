"""The load engine: the device writes to its own memory, at a rate, in short turns.

It runs in the server's loop, as a worker: in RUNNING and PRE_COPY only. The kernel would allow a device in a
P2P state to go on changing its own state; here it starts nothing there, so that the
dirty data at the stop is what the client saw when it decided to stop. Time in other states does not count
against the load.

The load behind registers (workload_registers.py) is the guest's: it migrates, and a reset ends it. The one
that an operator sets (`vfu_dev.server.operator_workload`) is the server's, and writes to any device.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple, Protocol, runtime_checkable

from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import Migration
from vfu_dev.migration.fsm import P2P_STATES, RUNNING_GROUP
from vfu_dev.workload import ArrayWriter, Pacer, Program, Workload, WorkloadFigures
from vfu_dev.workload.pacer import CATCH_UP_NS

_NS = 1_000_000_000

# How long one turn takes: a guest's MMIO waits for the rest of it.
TURN_SECONDS = 0.0001
# What is written between two reads of the clock, and how often the device wakes up for it at most.
_SLICE_BYTES = 64 << 10
_SLICE_WRITES = 1024
_WAKE_NS = 1_000_000
# A gap between turns that makes it worth asking whether the device was quiet meanwhile.
_GAP_NS = 5_000_000
_RATE_WINDOW_NS = _NS
_RATE_STEP_NS = _NS // 10


class WorkloadRates(NamedTuple):
    """What a scrape wants of a load: rates of the last second, and writes missed ever since."""

    asked_rate_bytes: float = 0.0
    reached_rate_bytes: float = 0.0
    missed_writes: int = 0


@runtime_checkable
class MakesWorkload(Protocol):
    """A worker that makes a load."""

    def rates(self) -> WorkloadRates:
        """Return what is asked for and reached now."""


class WorkloadRun:
    """One load on one memory, from its first write on.

    Args:
        program: of the load on this memory, when there is one already.
        first: number of the first write, for a load that began elsewhere.

    Raises: ConfigError: the memory is too small for it; a file cannot be used.
    """

    def __init__(
        self,
        spec: Workload,
        memory: DeviceMemory,
        migration: Migration,
        first: int = 0,
        program: Program | None = None,
    ) -> None:
        self.spec = spec
        self.memory = memory
        self._migration = migration
        program = program or Program(spec, memory.size_bytes, memory.page_size_bytes)
        self.asked_rate_bytes = program.asked_rate_bytes
        self._writers = [
            None if writes is None else ArrayWriter(memory.data, memory.page_size_bytes, writes)
            for writes in program.writes
        ]
        now = time.monotonic_ns()
        self._pacer: Pacer = program.pacer(now, first)
        self._began = self._last = now
        self._last_time = time.time()
        self._quiet_ns = 0
        self._wake: int | None = now
        self.written_bytes = 0
        self._window: deque[tuple[int, int]] = deque([(now, 0)])
        sizes = [writer.bytes_per_write or 4096 for writer in self._writers if writer is not None]
        self._limit = max(1, min(_SLICE_WRITES, _SLICE_BYTES // max(sizes, default=1)))

    @property
    def writes(self) -> int:
        """Writes made by this run."""
        return self._pacer.taken

    @property
    def missed(self) -> int:
        """Writes for which there was no time."""
        return self._pacer.missed

    def due(self) -> float | None:
        """See `Worker`."""
        if self._wake is None:
            return None
        return max(0, self._wake - time.monotonic_ns()) / _NS

    def advance(self, budget_seconds: float) -> None:
        """Make the writes that are due, for about the given time; returns when the next are due."""
        now = self._now()
        deadline = now + int(min(budget_seconds, TURN_SECONDS) * _NS)
        while True:
            runs = self._pacer.take(now, self._limit)
            for run in runs:
                writer = self._writers[run.phase]
                if writer is not None:
                    written, pages = writer.write(run.first, run.count)
                    self.memory.pages.mark_pages(pages)
                    self.written_bytes += written
            before, now = now, time.monotonic_ns()
            if sum(run.count for run in runs) < self._limit:
                # All that was due is done. Many small turns would cost more than the writes.
                following = self._pacer.next_ns()
                # Nor later than the pacer takes for being late: bursts, traces and slow loads pause for long.
                latest = before + CATCH_UP_NS // 2
                self._wake = None if following is None else min(max(following, before + _WAKE_NS), latest)
                break
            if now >= deadline:
                self._wake = now
                break
        self._last, self._last_time = now, time.time()
        if now - self._window[-1][0] >= _RATE_STEP_NS:
            self._window.append((now, self.written_bytes))
            while now - self._window[0][0] > _RATE_WINDOW_NS + _RATE_STEP_NS:
                self._window.popleft()

    def settle(self) -> None:
        """Count what is missed by now; nothing is written any more."""
        now = self._now()
        self._pacer.settle(now)
        self._last, self._last_time = now, time.time()

    def _now(self) -> int:
        """Return the clock, once the time in which the device had to be quiet is out of the load's."""
        now = time.monotonic_ns()
        if now - self._last > _GAP_NS:
            self._notice_quiet(now)
        return now

    def _notice_quiet(self, now: int) -> None:
        quiet = _quiet_seconds(self._migration, self._last_time)
        quiet_ns = min(int(quiet * _NS), now - self._last)
        if quiet_ns:
            self._pacer.hold(quiet_ns)
            self._quiet_ns += quiet_ns
            self._window.clear()
            self._window.append((now, self.written_bytes))

    def figures(self) -> WorkloadFigures:
        """Return what it did so far."""
        now = time.monotonic_ns()
        # Quiet time that was not subtracted yet, because the device still is quiet.
        quiet = self._quiet_ns + int(_quiet_seconds(self._migration, self._last_time) * _NS)
        since, had = self._window[0]
        recent = (self.written_bytes - had) * _NS / max(1, self._last - since)
        return WorkloadFigures.of(
            self._pacer,
            asked_rate_bytes=self.asked_rate_bytes,
            recent_rate_bytes=recent if now - self._last < _RATE_WINDOW_NS else 0.0,
            written_bytes=self.written_bytes,
            seconds=max(0, now - self._began - quiet) / _NS,
            quiet_seconds=quiet / _NS,
        )


def rates_of(run: WorkloadRun | None, missed_before: int) -> WorkloadRates:
    """Return what a load is asked for and reaches, with the writes that the loads before it missed."""
    if run is None:
        return WorkloadRates(missed_writes=missed_before)
    figures = run.figures()
    missed = missed_before + figures.missed_writes
    return WorkloadRates(figures.asked_rate_bytes, figures.recent_rate_bytes, missed)


def _quiet_seconds(migration: Migration, since: float) -> float:
    """Return how long since `since` (Unix time) the device was in states in which it does nothing."""
    active = RUNNING_GROUP - P2P_STATES
    until, quiet = time.time(), 0.0
    for transition in reversed(migration.transitions):
        begin = max(transition.time, since)
        if transition.target not in active:
            quiet += max(0.0, until - begin)
        if transition.time <= since:
            return quiet
        until = transition.time
        first = transition.origin
    else:
        # The first transition that is remembered is younger than `since`.
        if migration.transitions and first not in active:
            quiet += max(0.0, until - since)
    return quiet
