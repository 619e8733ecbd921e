"""What a device needs from guest memory, and the memory of a device that nobody attached."""

from __future__ import annotations

import errno
from typing import Protocol

from vfu_dev.errors import AccessError


class GuestMemory(Protocol):
    """Guest memory by the addresses that the guest gives its device. Errors are AccessError with an errno."""

    def check(self, address: int, count: int, *, write: bool) -> None:
        """Find out whether all of a range could be accessed now; touches nothing."""

    def read(self, address: int, out: memoryview) -> None:
        """Fill `out`."""

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Store `data`; what was written is logged for whoever migrates guest memory."""


class NoGuestMemory:
    """Guest memory where there is none: every access fails."""

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
