"""The seam between a device and its server: what a device can do to the machine it is plugged into.

`Device.attach` gets a `Bus`. The server has one over libvfio-user, `vfu_dev.testing` one in memory. A fault
is a layer around either of them.
"""

from __future__ import annotations

import errno
from typing import Protocol

from vfu_dev.errors import AccessError
from vfu_dev.uapi import VFIO_PCI_MSIX_IRQ_INDEX


class GuestMemory(Protocol):
    """Guest memory by the addresses that the guest gives its device. Errors are AccessError with an errno."""

    def check(self, address: int, count: int, *, write: bool) -> None:
        """Check that all of a range could be accessed now; touches nothing."""

    def read(self, address: int, out: memoryview) -> None:
        """Fill `out`."""

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Store `data`; the write is logged for the migration of guest memory."""


class Bus(GuestMemory, Protocol):
    """The PCI bus, from the device's end: guest memory (DMA), and interrupts.

    Called in the one thread that touches the device. DMA by messages may serve other requests meanwhile.
    """

    def is_master(self) -> bool:
        """Return whether the guest lets the device reach its memory: command register, and power state D0."""

    def irq_kind(self) -> int | None:
        """Return which VFIO_PCI_*_IRQ_INDEX the client has set up, None for none."""

    def raise_message(self, vector: int) -> bool:
        """Send the message of `vector`, by MSI or MSI-X; False when the client has not set it up."""

    def take_back(self, vector: int) -> bool:
        """Take a message back; False when the client has noticed it, or there was none."""

    def set_line(self, pending: bool, *, quiet: bool) -> None:
        """Set INTx, which is a level: asserted while `pending`, unless `quiet` or disabled by the guest.

        Args: pending: whether there is a cause, which the status register shows in any case.
        """

    def request_waits(self) -> bool:
        """Return whether a request of the client waits for the device to end its step of work."""


class NoBus:
    """The bus of a device that is not attached: no guest memory, and interrupts reach nobody."""

    def check(self, address: int, count: int, *, write: bool) -> None:
        """Refuse."""
        error = AccessError(f"DMA of {count} bytes at {address:#x}: no guest memory")
        error.errno = errno.EFAULT
        raise error

    def read(self, address: int, out: memoryview) -> None:
        """Refuse."""
        self.check(address, len(out), write=False)

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Refuse."""
        self.check(address, len(data), write=True)

    def is_master(self) -> bool:
        """Return False."""
        return False

    def irq_kind(self) -> int | None:
        """Return MSI-X, so that what is raised is a message to nobody."""
        return VFIO_PCI_MSIX_IRQ_INDEX

    def raise_message(self, vector: int) -> bool:
        """Return False."""
        return False

    def take_back(self, vector: int) -> bool:
        """Return False."""
        return False

    def set_line(self, pending: bool, *, quiet: bool) -> None:
        """Do nothing."""

    def request_waits(self) -> bool:
        """Return False."""
        return False
