"""Predicts a migration from page count, load, link and cost: passes, bytes, time, downtime, convergence.

docs/model.md derives it and says where it stops holding. In short: the memory is cut into bins of pages that
are alike (same pattern, neighbouring addresses), and for each bin three expected numbers are followed through
time: pages that are clean, pages that wait in the pass under way, pages that wait for the next one. The load
takes clean pages to the third, the link takes the second to the first, in the order of the session's own
policy (`vfu_dev.migration.plan`: sent least first; a page sent more often than usual that is written again
while it waits leaves the pass). QEMU's rule ends it: what is left fits into bandwidth times downtime limit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vfu_dev.convergence import WINDOW_SECONDS, sentence
from vfu_dev.memory.sending import INDEX_BYTES
from vfu_dev.migration.stream import FRAME_BYTES, pages_a_record
from vfu_dev.model.link import Link
from vfu_dev.model.writing import Bins, Vector, Writer, distinct_pages
from vfu_dev.sizes import format_count, format_size
from vfu_dev.workload import Workload
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES

# Minimum number of steps of a pass, and of a load's period.
_STEPS_A_PASS = 24
_STEPS_A_PERIOD = 24
_MAX_STEPS = 20_000
# Without a new minimum for this number of passes, and of seconds, the migration makes no progress.
_SETTLED_PASSES = 12
_SETTLED_SECONDS = 5.0


@dataclass(frozen=True)
class Prediction:
    """What a migration does; bytes are of the stream.

    Attributes:
        converges: whether the bytes left ever fit. Otherwise the figures are those of the simulated time.
        passes: as the session counts them, that of STOP_COPY included.
        left_bytes: when the device stopped; of a migration that does not converge, the least there ever was
            once it had settled.
        dirty_rate_bytes: of distinct pages written a second, in windows of 0.1 s.
    """

    converges: bool
    passes: int
    total_bytes: float
    precopy_bytes: float
    total_seconds: float
    downtime_seconds: float
    left_bytes: float
    threshold_bytes: float
    bandwidth: float
    dirty_rate_bytes: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON knows it."""
        return asdict(self)

    @property
    def text(self) -> str:
        """One sentence with the figures that decide convergence."""
        decided = sentence(
            self.converges, self.dirty_rate_bytes, self.bandwidth, self.left_bytes, self.threshold_bytes
        )
        if not self.converges:
            return decided
        return (
            f"{decided}; {format_count(self.passes, 'pass')}, {format_size(self.total_bytes)} in "
            f"{self.total_seconds:.2f} s, predicted downtime {self.downtime_seconds * 1000:.0f} ms"
        )


def page_cost_bytes(page_bytes: int = DEFAULT_PAGE_BYTES) -> float:
    """Return what a page costs in the stream: itself, its index, its share of a record's header."""
    return page_bytes + INDEX_BYTES + FRAME_BYTES / pages_a_record(page_bytes)


def border_rate(memory_bytes: float, link: Link, page_bytes: int = DEFAULT_PAGE_BYTES) -> float:
    """Return the dirty rate up to which a uniform load converges, bytes of pages a second.

    P (1 - s / r) pages left are as many as may be left, k, at r = s / (1 - k / P). k is what fits into the
    downtime limit, and half a burst more where the client sends in bursts. Infinite where all of P fits.
    """
    cost = page_cost_bytes(page_bytes)
    allowed = link.threshold_bytes + link.bandwidth * link.burst_seconds / 2
    share = allowed / (memory_bytes / page_bytes * cost)
    return math.inf if share >= 1 else link.bandwidth / cost * page_bytes / (1 - share)


class _Course:
    """One migration, step by step, as expected numbers."""

    def __init__(self, spec: Workload, pages: int, initial_pages: int, link: Link, page_bytes: int) -> None:
        self.bins = Bins.of(spec, pages)
        self.writer = Writer(spec, self.bins, page_bytes)
        self.link = link
        self.cost = page_cost_bytes(page_bytes)
        self.rate = link.bandwidth / self.cost  # pages a second
        count = len(self.bins.sizes)
        self.waiting = np.minimum(self.bins.sizes, np.maximum(0, initial_pages - self.bins.edges[:-1]))
        self.next = np.zeros(count)
        self.sends = np.zeros(count)
        self.usual = math.inf
        self.order = np.arange(count)
        self.passes = 1
        self.time = 0.0
        self.sent = 0.0
        self._pausing = link.pass_seconds

    @property
    def left(self) -> float:
        """Pages that wait."""
        return float(self.waiting.sum() + self.next.sum())

    def step(self, seconds: float) -> None:
        """Write and send for the given time; a pass that ends meanwhile is followed by the next."""
        touched = self.writer.touched(self.time, seconds)
        # Half of the writes before what is sent, half after: a step has no order within.
        half = 1 - np.sqrt(1 - touched)
        self._write(half)
        pause = min(seconds, self._pausing)
        self._pausing -= pause
        self._send((seconds - pause) * self.rate)
        self._write(half)
        self.time += seconds

    @property
    def ahead(self) -> float:
        """Pages that a client which sends in bursts has sent before an even stream would have."""
        return min(self.left, self.rate * self.link.burst_seconds / 2)

    def seen(self) -> float:
        """Return the pages that are left as the client finds them when it decides, see `Link`."""
        left = self.left - self.ahead
        if self.link.drain_bytes:
            touched = self.writer.touched(self.time, self.link.drain_bytes / self.link.bandwidth, peek=True)
            left += float((self.bins.sizes - self.waiting - self.next) @ touched)
        return max(0.0, left)

    def _write(self, touched: Vector) -> None:
        clean = self.bins.sizes - self.waiting - self.next
        self.next += np.maximum(0.0, clean) * touched
        hot = self.sends > self.usual
        if hot.any():
            leaving = np.where(hot, self.waiting * touched, 0.0)
            self.waiting -= leaving
            self.next += leaving

    def _send(self, pages: float) -> None:
        for _ in range(2):  # what is left of this pass, and as much of the next one
            if self.waiting.sum() < 1e-9:
                self._start_pass()
            if self._pausing:
                return
            queue = self.waiting[self.order]
            before = np.concatenate([[0.0], np.cumsum(queue)[:-1]])
            taken = np.clip(pages - before, 0.0, queue)
            sent = np.zeros_like(self.waiting)
            sent[self.order] = taken
            self.waiting -= sent
            self.sends += sent / self.bins.sizes
            self.sent += float(sent.sum())
            pages -= float(sent.sum())
            if pages < 1e-9 or self.next.sum() < 1e-9:
                return

    def _start_pass(self) -> None:
        if self.next.sum() < 1e-9:
            return
        self.waiting, self.next = self.next, np.zeros_like(self.next)
        self.usual = float(self.sends @ self.waiting / self.waiting.sum())
        self.order = np.argsort(np.round(self.sends), kind="stable")
        self.passes += 1
        self._pausing = self.link.pass_seconds


def predict(
    spec: Workload,
    pages: int,
    link: Link,
    *,
    initial_pages: int | None = None,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    tail_bytes: float = 1500.0,
    limit_seconds: float = 600.0,
) -> Prediction:
    """Predict the migration of a memory of the given number of pages under a load.

    Args:
        initial_pages: pages ever written when it begins; None for all.
        tail_bytes: what only STOP_COPY can carry: registers and the end.
        limit_seconds: how long the migration is followed; one that did not end by then does not converge.
    Raises: ConfigError: a trace, whose pattern is not known.
    """
    first = pages if initial_pages is None else min(pages, initial_pages)
    course = _Course(spec, pages, first, link, page_bytes)
    threshold = link.threshold_bytes
    lowest, lowest_pass, lowest_time = math.inf, 0, 0.0
    converged = False
    for _ in range(_MAX_STEPS):
        planned = float(course.waiting.sum()) / course.rate
        step = max(1e-4, min(WINDOW_SECONDS / 4, planned / _STEPS_A_PASS))
        step = max(min(step, course.writer.period_seconds / _STEPS_A_PERIOD), limit_seconds / _MAX_STEPS)
        course.step(step)
        left = course.seen() * course.cost + tail_bytes
        ready = not link.initial_first or course.passes > 1 or course.waiting.sum() < 1
        if left <= threshold and course.time >= WINDOW_SECONDS and ready:
            converged = True
            break
        if left < lowest * 0.999:
            lowest, lowest_pass, lowest_time = left, course.passes, course.time
        settled = course.passes - lowest_pass > _SETTLED_PASSES
        patience = _SETTLED_SECONDS + 2 * course.writer.cycle_seconds
        if course.time > limit_seconds or (settled and course.time - lowest_time > patience):
            break
    left = course.seen() * course.cost + tail_bytes
    stop_rate = link.stop_bandwidth or link.bandwidth
    precopy = (course.sent + course.ahead) * course.cost
    downtime = left / stop_rate + link.overhead_seconds
    distinct = distinct_pages(spec, pages, WINDOW_SECONDS, page_bytes) if not spec.phases else 0.0
    return Prediction(
        converges=converged,
        passes=course.passes + (1 if course.next.sum() >= 1 else 0),
        total_bytes=precopy + left,
        precopy_bytes=precopy,
        total_seconds=course.time + link.drain_bytes / link.bandwidth + downtime,
        downtime_seconds=downtime,
        left_bytes=left if converged else lowest,
        threshold_bytes=threshold,
        bandwidth=link.bandwidth,
        dirty_rate_bytes=distinct / WINDOW_SECONDS * course.cost,
    )
