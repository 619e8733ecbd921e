"""The interrupts of one context, of whichever kind its client has set up."""

from __future__ import annotations

from vfu_dev.libvfio_user import _ffi
from vfu_dev.libvfio_user.library import Library
from vfu_dev.uapi import VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX


class Irqs:
    """Raises and takes back what the client hears as events.

    Attributes:
        all_kinds: whether there is more than MSI-X; a foreign library does not say which kind is in use.
    """

    def __init__(self, library: Library, ctx: int) -> None:
        self.all_kinds = library.is_ours
        self._library = library
        self._ctx = ctx
        self._trigger = library.function("vfu_irq_trigger")
        if library.is_ours:
            self._get_type = library.function("vfu_irq_get_type")
            self._take_back = library.function("vfu_irq_take_back")
            self._count = _ffi.count()

    def announce(self, index: int, count: int) -> None:
        """Have `count` interrupts of the kind VFIO_PCI_*_IRQ_INDEX, before the context is realized."""
        self._library.check("vfu_setup_device_nr_irqs", self._ctx, index, count)

    def kind(self) -> int | None:
        """Return which VFIO_PCI_*_IRQ_INDEX the client has set up, None for none."""
        if not self.all_kinds:
            return VFIO_PCI_MSIX_IRQ_INDEX
        index: int = self._get_type(self._ctx, None)
        return None if index < 0 else index

    def trigger(self, vector: int) -> bool:
        """Raise a message; False when the client has not set that vector up."""
        return self._trigger(self._ctx, self._message(vector)) == 0  # type: ignore[no-any-return]

    def take_back(self, vector: int) -> bool:
        """Take a message back; False when the client has noticed it, or there was none."""
        return self.all_kinds and self._take_back(self._ctx, self._message(vector)) == 1

    def set_level(self, asserted: bool) -> None:
        """Set the level of INTx. Raises: LibraryError: a foreign library has none."""
        self._library.check("vfu_irq_set_level", self._ctx, asserted)

    def _message(self, vector: int) -> int:
        """Return the message for a vector: MSI may have been allowed fewer than there are, a power of two."""
        if vector == 0 or self.kind() != VFIO_PCI_MSI_IRQ_INDEX:
            return vector
        self._get_type(self._ctx, self._count)
        count: int = self._count.value
        return vector & max(0, count - 1)
