"""A device's interrupts: raised at once while the device runs, kept pending while it must be quiet.

In RUNNING_P2P and PRE_COPY_P2P a device starts nothing of its own (<linux/vfio.h>, "P2P"), and an MSI-X
interrupt is a write to memory. What is raised there, or while stopped, is remembered, migrates, and is raised
on whichever side runs again. Pending is one bit a vector, as in the PBA of real MSI-X.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vfu_dev.errors import StreamError
from vfu_dev.migration import RegisterBlock

MAX_VECTORS = 2048  # PCI_MSIX_FLAGS_QSIZE + 1, <linux/pci_regs.h>


class Interrupts:
    """The vectors of one device.

    Args:
        vectors: returns how many there are; at most `MAX_VECTORS`.

    Attributes:
        trigger: set by the server; raises a vector, True when the client has it set up.
    """

    def __init__(self, vectors: Callable[[], int]) -> None:
        self.trigger: Callable[[int], bool] = lambda _: False
        self._vectors = vectors
        self._pending = 0
        self._held = False

    @property
    def pending(self) -> list[int]:
        """Vectors that wait for the device to run, ascending."""
        return [vector for vector in range(self._pending.bit_length()) if self._pending >> vector & 1]

    def raise_vector(self, vector: int) -> None:
        """Raise `vector`, which exists, now or when the device runs again."""
        if self._held:
            self._pending |= 1 << vector
        else:
            self.trigger(vector)

    def hold(self) -> None:
        """Be quiet from now on."""
        self._held = True

    def release(self) -> None:
        """Raise what is pending, lowest vector first, and from now on everything at once."""
        self._held = False
        waiting, self._pending = self.pending, 0
        for vector in waiting:
            self.trigger(vector)

    def reset(self) -> None:
        """Forget what is pending."""
        self._pending = 0

    def block(self) -> RegisterBlock:
        """Return what migrates: one bit for each vector."""
        dtype = np.dtype([("pending", "<u8", (MAX_VECTORS // 64,))])
        return RegisterBlock("interrupts", dtype, self._pack, self._unpack, self._validate)

    def _pack(self) -> bytes:
        return self._pending.to_bytes(MAX_VECTORS // 8, "little")

    def _unpack(self, content: bytes) -> None:
        self._pending = int.from_bytes(content, "little")

    def _validate(self, content: bytes) -> None:
        if int.from_bytes(content, "little") >> self._vectors():
            raise StreamError(f"interrupts pending beyond the last of {self._vectors()} vectors")
