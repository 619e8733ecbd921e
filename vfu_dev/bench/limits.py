"""The limits of all ratios. `vfu-dev bench --check` fails if a ratio exceeds its limit.

They are targets, not measurements; docs/bench.md has the measured ratios.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limit:
    """A limit of a ratio: the least if more is better, else the most."""

    ratio: float
    better: Literal["less", "more"] = "less"

    def allows(self, ratio: float) -> bool:
        """Return whether `ratio` is within the limit."""
        return ratio <= self.ratio if self.better == "less" else ratio >= self.ratio


LIMITS = {
    # An access to memory may cost as much as in C. A register also runs Python.
    "mmio-read/p50": Limit(1.05),
    "mmio-read/p99": Limit(1.3),
    "mmio-write/p50": Limit(1.05),
    "mmio-write/p99": Limit(1.3),
    "mmio-posted/each": Limit(1.05),
    "mmio-register/p50": Limit(1.5),
    # Prometheus scrapes every few seconds; ten times a second is far beyond what anybody does.
    "mmio-scraped/p50": Limit(1.05),
    "mmio-scraped/p99": Limit(1.5),
    # Every command that only reads figures, ten times a second. It must have no measurable effect.
    "mmio-polled/p50": Limit(1.05),
    "mmio-polled/p99": Limit(1.5),
    "mmio-precopy-trap/p50": Limit(1.05),
    "mmio-precopy-trap/p99": Limit(1.3),
    # These are accesses to registers: the server does not see accesses to mapped memory.
    "mmio-precopy-mmap/p50": Limit(1.5),
    "mmio-precopy-mmap/p99": Limit(1.5),
    # Every page is hashed as it is sent; mapped ones are also copied, the guest may write.
    "mmio-behind-read-trap/p50": Limit(1.2),
    "mmio-behind-read-mmap/p50": Limit(1.5),
    "stream-out-trap/rate": Limit(1.0, "more"),
    "stream-out-mmap/rate": Limit(0.6, "more"),
    # Our server hashes all memory; the peer in C checks nothing.
    "stream-in/rate": Limit(1.0, "more"),
    # In memory that the client shares, against the peer's messages; all of it verified.
    "window-out/rate": Limit(2.0, "more"),
    "window-in/rate": Limit(2.0, "more"),
    # Of 100 us, behind a read of 1 MiB or in the middle of it.
    "mmio-behind-window/p99": Limit(1.0),
    "scan-mmap/gib": Limit(0.7),
    # A scan of one byte a page: 0.06 ms a GiB.
    "scan-trap/gib": Limit(12.0),
    # Each page is hashed by itself, and nothing is done twice.
    "audit/gib": Limit(1.1),
    "dma-to-device/rate": Limit(0.9, "more"),
    "dma-to-guest/rate": Limit(0.9, "more"),
    "serve/start": Limit(2.0),
    # Over a link with a limit, which leaves little to guess.
    "forecast/apart": Limit(1.25),
    "downtime/apart": Limit(1.1),
    # vfio-pci and the preloaded library, against vfio-user-pci in the same QEMU.
    "front-end-reads/p50": Limit(1.1),
    "front-end-writes/p50": Limit(1.1),
    "front-end-out/rate": Limit(0.9, "more"),
    "front-end-in/rate": Limit(0.9, "more"),
    # Of what QEMU itself allows, which the peer shows.
    "qemu-out/rate": Limit(0.9, "more"),
    "qemu-in/rate": Limit(0.9, "more"),
    # A device of 1 GiB that QEMU moves without pre-copy.
    "qemu-downtime/all": Limit(1.0),
    # The engine works in slices of 512 KiB, and an access waits for the rest of one.
    "mmio-dma/p50": Limit(3.0),
    "mmio-dma/p99": Limit(20.0),
}
