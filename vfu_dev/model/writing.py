"""Which part of a memory a load writes in a stretch of time, as expected numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import ConfigError
from vfu_dev.workload import Workload
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES

Vector = npt.NDArray[np.float64]


# Number of bins of equal size, and of bins that grow from the start of the memory, where hot pages are.
_EVEN_BINS = 256


_GROWING_BINS = 128


def distinct_pages(spec: Workload, pages: int, seconds: float, page_bytes: int = DEFAULT_PAGE_BYTES) -> float:
    """Return the expected number of distinct pages that a steady load writes in a time."""
    bins = Bins.of(spec, pages)
    touched = Writer(spec, bins, page_bytes).touched(0.0, seconds)
    return float(bins.sizes @ touched)


@dataclass(frozen=True)
class Bins:
    """The memory, cut where a pattern may change: `edges` are page numbers, `sizes` pages of each bin."""

    edges: Vector
    sizes: Vector

    @classmethod
    def of(cls, spec: Workload, pages: int) -> Bins:
        """Return the bins of a memory: finer where hot pages are."""
        loads = [phase.load for phase in spec.phases] or [spec]
        cuts = [np.linspace(0, pages, min(pages, _EVEN_BINS) + 1)]
        cuts.append(np.geomspace(1, pages, min(pages, _GROWING_BINS)))
        cuts.append(np.array([float(_hot_pages(load, pages)) for load in loads]))
        edges: Vector = np.unique(np.round(np.concatenate(cuts))).astype(np.float64)
        return cls(edges, np.diff(edges))


def _hot_pages(load: Workload, pages: int) -> int:
    return max(1, int(pages * load.hot_fraction))


class Writer:
    """Which share of each bin's pages a load writes in a stretch of time."""

    def __init__(self, spec: Workload, bins: Bins, page_bytes: int) -> None:
        if spec.pattern == "trace":
            raise ConfigError("trace: the model needs a pattern")
        self._bins = bins
        self._pages = float(bins.edges[-1])
        loads = [(phase.seconds, phase.load) for phase in spec.phases] or [(math.inf, spec)]
        self._loads = [
            (seconds, load, float(load.write_rate(page_bytes) * load.pages_per_write(page_bytes)))
            for seconds, load in loads
        ]
        self._weights = [self._per_page(load) for _, load in loads]
        self._cursors = [0.0 for _ in loads]
        self._cycle = sum(seconds for seconds, _ in loads)

    @property
    def period_seconds(self) -> float:
        """The shortest time in which the load changes; infinite for a steady one."""
        times = [seconds for seconds, _, _ in self._loads]
        times += [
            min(load.burst.duty, 1 - load.burst.duty) * load.burst.period_seconds
            for _, load, _ in self._loads
            if load.burst is not None and load.burst.duty < 1
        ]
        return min(times)

    @property
    def cycle_seconds(self) -> float:
        """Period in seconds of a load with phases or bursts; 0 for a steady one."""
        bursts = [load.burst.period_seconds for _, load, _ in self._loads if load.burst is not None]
        return max([0.0, *bursts, self._cycle if len(self._loads) > 1 else 0.0])

    def _per_page(self, load: Workload) -> Vector:
        """Return the share of all writes that goes to a page of each bin."""
        pages, sizes, edges = self._pages, self._bins.sizes, self._bins.edges
        if load.pattern == "hotset":
            hot = _hot_pages(load, int(pages))
            if hot < pages:
                is_hot = edges[:-1] < hot
                return np.where(is_hot, load.hot_share / hot, (1 - load.hot_share) / (pages - hot))
        if load.pattern == "zipf":
            sums = np.concatenate([[0.0], np.cumsum(np.arange(1, pages + 1) ** -load.zipf_exponent)])
            share: Vector = np.diff(sums[edges.astype(np.int64)]) / sums[-1] / sizes
            return share
        return np.full(len(sizes), 1 / pages)

    def touched(self, now: float, seconds: float, peek: bool = False) -> Vector:
        """Return the share of each bin that is written between `now` and `seconds` later, and go on there.

        Args: peek: do not go on.
        """
        number, inside = 0, now
        if len(self._loads) > 1:
            inside = now % self._cycle
            while number + 1 < len(self._loads) and inside >= self._loads[number][0]:
                inside -= self._loads[number][0]
                number += 1
        _, load, rate = self._loads[number]
        if load.is_idle:
            return np.zeros(len(self._bins.sizes))
        writes = rate * _active(load, inside, seconds)
        if load.pattern == "sequential":
            begin = self._cursors[number]
            if not peek:
                self._cursors[number] = (begin + writes) % self._pages
            if writes >= self._pages:
                return np.ones(len(self._bins.sizes))
            parts = _overlap(self._bins, begin, min(begin + writes, self._pages))
            parts += _overlap(self._bins, 0.0, max(0.0, begin + writes - self._pages))
            return np.minimum(1.0, parts / self._bins.sizes)
        share: Vector = -np.expm1(-writes * self._weights[number])
        return share


def _overlap(bins: Bins, begin: float, end: float) -> Vector:
    low, high = np.maximum(bins.edges[:-1], begin), np.minimum(bins.edges[1:], end)
    overlap: Vector = np.maximum(0.0, high - low)
    return overlap


def _active(load: Workload, begin: float, seconds: float) -> float:
    """Return for how much of a stretch of time the load's average rate stands: more in a burst."""
    if load.burst is None or load.burst.duty >= 1:
        return seconds
    period, on = load.burst.period_seconds, load.burst.duty * load.burst.period_seconds

    def until(time: float) -> float:
        return time // period * on + min(time % period, on)

    return (until(begin + seconds) - until(begin)) / load.burst.duty
