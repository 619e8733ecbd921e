"""A device's interrupts: raised at once while the device runs, kept pending while it must be quiet.

The client uses one of INTx, MSI and MSI-X at a time. A message is raised and forgotten. INTx is a line,
asserted as long as there is a cause that the guest has not acknowledged: vector n, or 31 for all beyond.

In RUNNING_P2P and PRE_COPY_P2P a device starts nothing by itself (<linux/vfio.h>, "P2P"), and a message is a
write to memory. An interrupt raised there, or while the device is stopped, stays pending, migrates, and is
raised on the side that runs again. Pending is one bit per vector, as in the PBA of real MSI-X. A message
raised earlier that the client has not noticed becomes pending too, because after the move no client would
read it. Either the client has a message or the device, never both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vfu_dev.device.bus import Bus
from vfu_dev.device.counters import Counters
from vfu_dev.errors import StreamError
from vfu_dev.migration import RegisterBlock
from vfu_dev.uapi import (
    MAX_MSIX_VECTORS,
    VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
)

CAUSES = 32

_KINDS = {
    VFIO_PCI_INTX_IRQ_INDEX: "intx",
    VFIO_PCI_MSI_IRQ_INDEX: "msi",
    VFIO_PCI_MSIX_IRQ_INDEX: "msix",
}


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


class Interrupts:
    """The vectors of one device.

    Args:
        vectors: returns how many there are; at most `MAX_MSIX_VECTORS`.
        bus: what carries them; `Device.attach` puts another one here.
        counters: the device's; `irq_errors` counts messages that the client has not set up.

    Attributes:
        asserted: causes of INTx that the guest has not acknowledged, one bit each.
        has_line: whether there is INTx: whether the guest has a register to acknowledge it.
        mirror: called with `asserted`, for that register.
    """

    def __init__(self, vectors: Callable[[], int], bus: Bus, counters: Counters) -> None:
        self.bus = bus
        self.asserted = 0
        self.has_line = False
        self.mirror: Callable[[int], None] = lambda _: None
        self._vectors = vectors
        self._counters = counters
        self._pending = 0
        self._sent = 0  # vectors raised since the device was last quiet
        self._held = False

    @property
    def pending(self) -> list[int]:
        """Vectors that wait for the device to run, ascending."""
        return _bits(self._pending)

    @property
    def is_line_up(self) -> bool:
        """Whether the device asserts INTx; the guest may have disabled it."""
        return self.asserted != 0 and not self._held

    def as_dict(self) -> dict[str, object]:
        """Return which kind the client uses, what is pending, and the causes of INTx; for `status`."""
        kind = self.bus.irq_kind()
        return {
            "kind": None if kind is None else _KINDS[kind],
            "pending": self.pending,
            "intx_causes": _bits(self.asserted),
        }

    def raise_vector(self, vector: int) -> None:
        """Raise `vector`, which exists, now or when the device runs again."""
        if self._held:
            self._pending |= 1 << vector
        elif self.has_line and self.bus.irq_kind() == VFIO_PCI_INTX_IRQ_INDEX:
            self.asserted |= 1 << min(vector, CAUSES - 1)
            self.update_line()
        else:
            self._sent |= 1 << vector
            self._counters.irq_errors += not self.bus.raise_message(vector)

    def acknowledge(self, causes: int) -> None:
        """Take back causes of INTx, which the guest has seen."""
        self.asserted &= ~causes
        self.update_line()

    def update_line(self) -> None:
        """Set INTx to what it should be; called when anything that it depends on has changed."""
        if self.has_line:
            self.mirror(self.asserted)
            self.bus.set_line(self.asserted != 0, quiet=self._held)

    def hold(self) -> None:
        """Be quiet from now on, and take back the messages that the client has not noticed."""
        if self._held:
            return
        self._held = True
        self.update_line()
        for vector in _bits(self._sent):
            if self.bus.take_back(vector):
                self._pending |= 1 << vector
        self._sent = 0

    def release(self) -> None:
        """Raise what is pending, lowest vector first, and from now on everything at once."""
        self._held = False
        waiting, self._pending = self.pending, 0
        for vector in waiting:
            self.raise_vector(vector)
        self.update_line()

    def reset(self) -> None:
        """Forget what is pending, and every cause."""
        self._pending = self._sent = self.asserted = 0
        self.update_line()

    def block(self) -> RegisterBlock:
        """Return what migrates: one bit for each vector, and the causes of INTx."""
        dtype = np.dtype([("pending", "<u8", (MAX_MSIX_VECTORS // 64,)), ("asserted", "<u4")])
        return RegisterBlock(
            "interrupts", dtype, self._pack, self._unpack, self._validate, defaults={"asserted": 0}
        )

    def _pack(self) -> bytes:
        return self._pending.to_bytes(MAX_MSIX_VECTORS // 8, "little") + self.asserted.to_bytes(4, "little")

    def _unpack(self, content: bytes) -> None:
        self._pending = int.from_bytes(content[:-4], "little")
        self.asserted = int.from_bytes(content[-4:], "little")
        self.update_line()

    def _validate(self, content: bytes) -> None:
        vectors = self._vectors()
        if int.from_bytes(content[:-4], "little") >> vectors:
            raise StreamError(f"interrupts pending beyond the last of {vectors} vectors")
        asserted = int.from_bytes(content[-4:], "little")
        if asserted >> min(vectors, CAUSES) or (asserted and not self.has_line):
            raise StreamError(f"INTx asserted for causes that {vectors} vectors cannot have: {asserted:#x}")
