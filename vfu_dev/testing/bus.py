"""A bus without a guest: memory for DMA, and a record of the interrupts."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from vfu_dev.errors import AccessError
from vfu_dev.uapi import VFIO_PCI_MSIX_IRQ_INDEX


@dataclass(eq=False)
class GuestRegion:
    """Memory at `iova`, as `vfu_dev.client.dma.DmaRegion`; the test reads and writes `memory`."""

    iova: int
    memory: bytearray


class InMemoryBus:
    """A `Bus` over memory regions, with nothing between them, and lists of what the device did.

    Attributes:
        regions: guest memory.
        accesses: (address, count, whether it is a write) of each access to it so far.
        irqs: every vector raised as a message so far, in order.
        kind: which VFIO_PCI_*_IRQ_INDEX the client uses.
        unnoticed: vectors that the client has not noticed yet, so that the device may take them back.
        line: whether INTx is asserted.
        waiting: whether a client waits for an access, so that work ends its step.
    """

    def __init__(self) -> None:
        self.regions: list[GuestRegion] = []
        self.accesses: list[tuple[int, int, bool]] = []
        self.irqs: list[int] = []
        self.kind: int | None = VFIO_PCI_MSIX_IRQ_INDEX
        self.unnoticed: set[int] = set()
        self.line = False
        self.waiting = False

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

    def is_master(self) -> bool:
        """Return True."""
        return True

    def irq_kind(self) -> int | None:
        """Return `kind`."""
        return self.kind

    def raise_message(self, vector: int) -> bool:
        """Note it; the client has set up all."""
        self.irqs.append(vector)
        return True

    def take_back(self, vector: int) -> bool:
        """Return whether it is unnoticed; from then on it is nowhere."""
        taken = vector in self.unnoticed
        self.unnoticed.discard(vector)
        return taken

    def set_line(self, pending: bool, *, quiet: bool) -> None:
        """Set `line`."""
        self.line = pending and not quiet

    def request_waits(self) -> bool:
        """Return `waiting`."""
        return self.waiting
