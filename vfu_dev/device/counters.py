"""The counters of a device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vfu_dev.figures import MMIO_EDGES_SECONDS, Histogram


class Accesses:
    """The accesses of one direction that were served, to all BARs together.

    Attributes:
        count, bytes: of those that Python served, for who serves them.
        shared: of those that C served: count, bytes, nanoseconds, then the counts of the histogram's buckets;
            shape (3 + buckets,) uint64.
        seconds: their durations, of both.
    """

    __slots__ = ("bytes", "count", "seconds", "shared")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.shared: npt.NDArray[np.uint64] = np.zeros(3 + len(MMIO_EDGES_SECONDS) + 1, dtype=np.uint64)
        self.seconds = Histogram(MMIO_EDGES_SECONDS, self.shared[2:])

    @property
    def total(self) -> int:
        """Number of accesses, by Python and by C."""
        return self.count + int(self.shared[0])

    @property
    def total_bytes(self) -> int:
        """Bytes of these accesses."""
        return self.bytes + int(self.shared[1])


@dataclass
class Counters:
    """Plain integers that the hot path adds to and everybody else reads; `as_dict` has all of them."""

    reads: Accesses = field(default_factory=Accesses)
    writes: Accesses = field(default_factory=Accesses)
    irqs: int = 0
    irq_errors: int = 0  # raised, but there is no such vector or the guest has not set it up
    refused_accesses: int = 0
    refused_by_state: int = 0  # of these, writes that the migration state forbids; the rest is out of bounds
    dma_read_bytes: int = 0
    dma_written_bytes: int = 0
    dma_errors: int = 0
    protocol_errors: int = 0
    connections: int = 0
    resets: int = 0

    @property
    def region_reads(self) -> int:
        """Reads of BARs that were served."""
        return self.reads.total

    @property
    def region_writes(self) -> int:
        """Writes to BARs that were served."""
        return self.writes.total

    @property
    def region_read_bytes(self) -> int:
        """Bytes of these reads."""
        return self.reads.total_bytes

    @property
    def region_written_bytes(self) -> int:
        """Bytes of these writes."""
        return self.writes.total_bytes

    def as_dict(self) -> dict[str, int]:
        """Return every counter by name."""
        accesses = {
            "region_reads": self.region_reads,
            "region_writes": self.region_writes,
            "region_read_bytes": self.region_read_bytes,
            "region_written_bytes": self.region_written_bytes,
        }
        return accesses | {name: value for name, value in vars(self).items() if isinstance(value, int)}
