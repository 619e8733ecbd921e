"""A classic histogram of durations, cheap enough for a path that a guest waits on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# What a guest waits for: registers take about 2 us, the client gives up at 5 s.
MMIO_EDGES_SECONDS = (
    1e-6,
    2e-6,
    5e-6,
    10e-6,
    20e-6,
    50e-6,
    100e-6,
    200e-6,
    500e-6,
    1e-3,
    5e-3,
    20e-3,
    100e-3,
    1.0,
)

# What a VM stands still for: QEMU's default limit of 0.3 s is an edge, its highest sensible use is a minute.
DOWNTIME_EDGES_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)


class Histogram:
    """Counts of durations between edges; one thread observes, others may read the plain integers.

    Args:
        edges_seconds: ascending upper edges, each inclusive; the bucket above them all is implied.
        shared: where C observes: the sum in nanoseconds, then its counts, shape (1 + buckets,) uint64.

    Attributes:
        counts: Python's observations in each bucket (not cumulative), one more than there are edges.
        edges_ns: the edges in nanoseconds.
        sum_ns: of all of Python's observations, nanoseconds.
    """

    __slots__ = ("counts", "edges_ns", "edges_seconds", "shared", "sum_ns")

    def __init__(self, edges_seconds: Sequence[float], shared: npt.NDArray[np.uint64] | None = None) -> None:
        self.edges_seconds = tuple(edges_seconds)
        # Whole nanoseconds, as the clock gives them: comparing integers is what bisect does fastest.
        self.edges_ns = [round(edge * 1e9) for edge in edges_seconds]
        self.counts = [0] * (len(self.edges_ns) + 1)
        self.sum_ns = 0
        self.shared = shared

    def observe_ns(self, nanoseconds: int) -> None:
        """Count one duration."""
        self.counts[bisect_left(self.edges_ns, nanoseconds)] += 1
        self.sum_ns += nanoseconds

    def observe(self, seconds: float) -> None:
        """Count one duration given in seconds."""
        self.observe_ns(round(seconds * 1e9))

    def totals(self) -> tuple[list[int], int]:
        """Return the counts of the buckets, not cumulative, and the sum in nanoseconds, C's included."""
        if self.shared is None:
            return list(self.counts), self.sum_ns
        sum_ns, *counts = self.shared.tolist()
        return [mine + other for mine, other in zip(self.counts, counts, strict=True)], self.sum_ns + sum_ns

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.totals()[0])

    def as_dict(self) -> dict[str, object]:
        """Return edges and sum in seconds, and the counts of the buckets, not cumulative."""
        counts, sum_ns = self.totals()
        return {"edges": list(self.edges_seconds), "counts": counts, "sum": sum_ns / 1e9}
