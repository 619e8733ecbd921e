"""Guest memory for a device without a guest."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from vfu_dev.errors import AccessError


@dataclass(eq=False)
class GuestRegion:
    """Memory at `iova`, as `vfu_dev.client.dma.DmaRegion`; the test reads and writes `memory`."""

    iova: int
    memory: bytearray


class GuestRegions:
    """What a device reaches as `guest_memory`: regions, and nothing between them.

    Attributes:
        accesses: (address, count, whether it is a write) of each access so far.
    """

    def __init__(self) -> None:
        self.regions: list[GuestRegion] = []
        self.accesses: list[tuple[int, int, bool]] = []

    def _find(self, address: int, count: int) -> memoryview:
        for region in self.regions:
            start = address - region.iova
            if 0 <= start <= len(region.memory) and count <= len(region.memory) - start:
                return memoryview(region.memory)[start : start + count]
        error = AccessError(f"DMA of {count} bytes at {address:#x}: no guest memory there")
        error.errno = errno.EFAULT
        raise error

    def check(self, address: int, count: int, *, write: bool) -> None:
        """Find out whether all of a range could be accessed. Raises: AccessError: it could not."""
        self._find(address, count)

    def read(self, address: int, out: memoryview) -> None:
        """Fill `out`. Raises: AccessError: not all of it is there."""
        self.accesses.append((address, len(out), False))
        out[:] = self._find(address, len(out))

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Store `data`. Raises: AccessError: not all of it has a place."""
        self.accesses.append((address, len(data), True))
        self._find(address, len(data))[:] = data
