"""Guest memory as a device reaches it: the client's DMA regions, mapped where they have a file.

Every access goes region by region through libvfio-user's scatter-gather calls, because they keep the log of
what was written: `vfu_sgl_put` marks it. A region without a file is reached by messages to the client.
"""

from __future__ import annotations

import errno
import logging
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from vfu_dev.errors import AccessError
from vfu_dev.libvfio_user import _ffi
from vfu_dev.libvfio_user.library import Library

logger = logging.getLogger(__name__)

_PROT_READ, _PROT_WRITE = 1, 2  # <sys/mman.h>; libvfio-user translates VFIO_DMA_MAP_FLAG_* to these


class GuestMemoryError(AccessError):
    """Guest memory that the device may not reach.

    Attributes:
        address, count: the part that was wanted.
        errno: EFAULT for no region, EACCES for a region of the other direction, else what the transfer gave.
    """

    def __init__(self, number: int, address: int, count: int, reason: str) -> None:
        super().__init__(f"DMA of {count} bytes at {address:#x}: {reason}")
        self.errno = number
        self.address = address
        self.count = count


@dataclass(frozen=True)
class DmaRegion:
    """One mapping that the client made; `shared` when it came with a file."""

    address: int
    size_bytes: int
    protection: int
    shared: bool


class DmaMemory:
    """All DMA regions of one context.

    Attributes:
        log_writes: False makes writes invisible to DMA logging. A fault, for tests that must be able to fail.
        message_transfers: pieces that went by DMA_READ or DMA_WRITE.
    """

    def __init__(self, library: Library, ctx: int) -> None:
        self.log_writes = True
        self.message_transfers = 0
        self._ctx = ctx
        self._sg = _ffi.scratch(library.function("dma_sg_size")())
        self._iov = _ffi.IoVec()
        self._to_sgl = library.function("vfu_addr_to_sgl")
        self._get = library.function("vfu_sgl_get")
        self._put = library.function("vfu_sgl_put")
        self._read = library.function("vfu_sgl_read")
        self._write = library.function("vfu_sgl_write")
        self._regions: list[DmaRegion] = []  # by address; the library refuses overlaps
        self._starts: list[int] = []

    @property
    def regions(self) -> tuple[DmaRegion, ...]:
        """What is mapped now, by address."""
        return tuple(self._regions)

    def registered(self, info_address: int) -> None:
        """Follow vfu_dma_register_cb_t. The same region may be announced again."""
        address, size, protection, shared = _ffi.dma_info(info_address)
        self._forget(address)
        index = bisect_right(self._starts, address)
        self._starts.insert(index, address)
        self._regions.insert(index, DmaRegion(address, size, protection, shared))

    def unregistered(self, info_address: int) -> None:
        """Follow vfu_dma_unregister_cb_t."""
        self._forget(_ffi.dma_info(info_address)[0])

    def _forget(self, address: int) -> None:
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and self._starts[index] == address:
            del self._starts[index], self._regions[index]

    def _pieces(self, address: int, count: int, protection: int) -> Iterator[tuple[DmaRegion, int, int]]:
        """Yield (region, address, count) for the parts of a range, in order.

        Raises:  GuestMemoryError: at the first part that is in no region or not allowed.
        """
        while count > 0:
            index = bisect_right(self._starts, address) - 1
            region = self._regions[index] if index >= 0 else None
            left = 0 if region is None else region.address + region.size_bytes - address
            if region is None or left <= 0:
                raise GuestMemoryError(errno.EFAULT, address, count, "no DMA region there")
            if not region.protection & protection:
                kind = "written" if protection == _PROT_WRITE else "read"
                raise GuestMemoryError(errno.EACCES, address, count, f"that region may not be {kind}")
            part = min(left, count)
            yield region, address, part
            address += part
            count -= part

    def check(self, address: int, count: int, *, write: bool) -> None:
        """Find out whether a whole range could be accessed now.

        Raises:  GuestMemoryError: it could not; nothing was touched.
        """
        for _ in self._pieces(address, count, _PROT_WRITE if write else _PROT_READ):
            pass

    def read(self, address: int, out: memoryview) -> None:
        """Fill `out` from guest memory at `address`.

        Raises:  GuestMemoryError: a part could not be read; what comes before it is in `out`.
        """
        done = 0
        for region, start, part in self._pieces(address, len(out), _PROT_READ):
            target = out[done : done + part]
            self._prepare(start, part, _PROT_READ)
            if region.shared:
                self._map(start, part)
                target[:] = _ffi.view(self._iov.iov_base, part)
                self._put(self._ctx, self._sg, self._iov, 1)
            else:
                buffer = _ffi.scratch(part)
                self._message(self._read(self._ctx, self._sg, 1, buffer), start, part)
                target[:] = memoryview(buffer).cast("B")
            done += part

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Store `data` in guest memory at `address`, and have DMA logging know.

        Raises:  GuestMemoryError: a part could not be written; what comes before it was.
        """
        source = memoryview(data)
        done = 0
        for region, start, part in self._pieces(address, len(source), _PROT_WRITE):
            piece = source[done : done + part]
            self._prepare(start, part, _PROT_WRITE)
            if region.shared:
                self._map(start, part)
                _ffi.view(self._iov.iov_base, part)[:] = piece
                if self.log_writes:
                    self._put(self._ctx, self._sg, self._iov, 1)
            else:
                self._message(self._write(self._ctx, self._sg, 1, bytes(piece)), start, part)
            done += part

    def _prepare(self, address: int, count: int, protection: int) -> None:
        """Look up a piece of one region, into `_sg`."""
        if self._to_sgl(self._ctx, address, count, self._sg, 1, protection) != 1:
            number = _ffi.last_errno() or errno.EFAULT
            raise GuestMemoryError(number, address, count, "libvfio-user does not find it")

    def _map(self, address: int, count: int) -> None:
        if self._get(self._ctx, self._sg, self._iov, 1, 0) != 0:
            raise GuestMemoryError(_ffi.last_errno(), address, count, "libvfio-user does not map it")

    def _message(self, result: int, address: int, count: int) -> None:
        self.message_transfers += 1
        if result != 0:
            reason = "the client refused it, or answered too late"
            raise GuestMemoryError(_ffi.last_errno() or errno.EIO, address, count, reason)
