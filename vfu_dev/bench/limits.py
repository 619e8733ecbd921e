"""What the ratios may be: the one place. `vfu-dev bench --check` fails beyond them.

Each is what was measured on two cores, with other jobs running, and as much again or so: a limit that
ordinary noise breaks would be ignored. docs/bench.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limit:
    """A bound on a ratio: from below where more is better, else from above."""

    ratio: float
    better: Literal["less", "more"] = "less"

    def allows(self, ratio: float) -> bool:
        """Say whether `ratio` keeps it."""
        return ratio <= self.ratio if self.better == "less" else ratio >= self.ratio


LIMITS = {
    # A callback in Python takes 2 us of the 16 us that a message takes there and back.
    "mmio-read/p50": Limit(1.5),
    "mmio-read/p99": Limit(3.0),
    "mmio-write/p50": Limit(1.5),
    "mmio-write/p99": Limit(3.0),
    # Prometheus scrapes every few seconds; ten times a second is far beyond what anybody does.
    "mmio-scraped/p50": Limit(1.2),
    "mmio-scraped/p99": Limit(2.5),
    # All that only asks, ten times a second. It must not be seen at all.
    "mmio-polled/p50": Limit(1.05),
    "mmio-polled/p99": Limit(1.5),
    "mmio-precopy-trap/p50": Limit(1.5),
    "mmio-precopy-trap/p99": Limit(3.0),
    # Registers: in mmap the memory itself is not seen by the server at all.
    "mmio-precopy-mmap/p50": Limit(2.5),
    "mmio-precopy-mmap/p99": Limit(4.0),
    # Every page is hashed and checksummed as it is sent; mapped ones are also copied, the guest may write.
    "mmio-behind-read-trap/p50": Limit(4.0),
    "mmio-behind-read-mmap/p50": Limit(8.0),
    "stream-out-trap/rate": Limit(0.3, "more"),
    "stream-out-mmap/rate": Limit(0.07, "more"),
    # Checksums of all records, and in the end a hash of all that lies in memory; C checks nothing.
    "stream-in/rate": Limit(0.15, "more"),
    "scan-mmap/gib": Limit(2.5),
    "scan-trap/gib": Limit(12.0),
    "dma-to-device/rate": Limit(0.2, "more"),
    "dma-to-guest/rate": Limit(0.2, "more"),
    # Over a link with a limit, which leaves little to guess.
    "forecast/apart": Limit(1.25),
    "downtime/apart": Limit(1.1),
    # vfio-pci and the preloaded library, against vfio-user-pci in the same QEMU.
    "front-end-reads/p50": Limit(1.1),
    "front-end-writes/p50": Limit(1.1),
    "front-end-out/rate": Limit(0.9, "more"),
    "front-end-in/rate": Limit(0.9, "more"),
    # The engine works in slices of 256 KiB, and an access waits for the rest of one.
    "mmio-dma/p50": Limit(3.0),
    "mmio-dma/p99": Limit(20.0),
}
