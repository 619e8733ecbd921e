"""Guest memory as a device reaches it: the client's DMA regions, mapped where they have a file.

Every access goes region by region through libvfio-user, which keeps the log of what was written. A region
without a file is reached by messages to the client.
"""

from __future__ import annotations

import errno
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
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
    """All DMA regions of one context."""

    def __init__(self, library: Library, ctx: int) -> None:
        self._copy = _guarded(library, ctx) if library.is_ours else _unguarded(library, ctx)
        self._regions: list[DmaRegion] = []  # by address; the library refuses overlaps
        self._starts: list[int] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing is mapped."""
        return not self._regions

    def registered(self, info_address: int) -> None:
        """Follow vfu_dma_register_cb_t. A foreign library may announce the same region again."""
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

        Raises: GuestMemoryError: at the first part that is in no region or not allowed.
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

        Raises: GuestMemoryError: it could not; nothing was touched.
        """
        for _ in self._pieces(address, count, _PROT_WRITE if write else _PROT_READ):
            pass

    def read(self, address: int, out: memoryview) -> None:
        """Fill `out` from guest memory at `address`.

        Raises: GuestMemoryError: a part could not be read; what comes before it is in `out`.
        """
        if out:
            self._access(address, out, 0)

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Store `data` in guest memory at `address`, and have DMA logging know.

        Raises: GuestMemoryError: a part could not be written; what comes before it was.
        """
        if data:
            self._access(address, data, _ffi.VFU_DMA_WRITE)

    def write_unlogged(self, address: int, data: memoryview | bytes) -> None:
        """Do the same, and let DMA logging know nothing of it: a fault (op=dma-write,unlogged)."""
        if data:
            self._access(address, data, _ffi.VFU_DMA_WRITE | _ffi.VFU_DMA_UNLOGGED)

    def _access(self, address: int, buffer: memoryview | bytes, flags: int) -> None:
        """Copy piece by piece, each within one region."""
        here = _ffi.address_of(buffer)
        protection = _PROT_WRITE if flags else _PROT_READ
        for region, start, part in self._pieces(address, len(buffer), protection):
            if self._copy(region, start, here, part, flags) != 0:
                raise _failed(region, start, part)
            here += part


def _failed(region: DmaRegion, address: int, count: int) -> GuestMemoryError:
    number = _ffi.last_errno() or errno.EIO
    if not region.shared:
        reason = "the client refused it, or its reply came too late"
    elif number == errno.EFAULT:
        reason = "the client has truncated this region's file"
    else:
        reason = "libvfio-user does not find it"
    return GuestMemoryError(number, address, count, reason)


# Copies a piece between guest memory and an address here: (region, guest address, address, bytes, VFU_DMA_*).
# Returns 0 on success; errno says what was wrong otherwise.
_Copy = Callable[[DmaRegion, int, int, int, int], int]


def _guarded(library: Library, ctx: int) -> _Copy:
    """Return the copy that lives when the client shortens its file meanwhile."""
    access = library.function("vfu_dma_access")
    return lambda _, guest, here, count, flags: access(ctx, guest, here, count, flags)


def _unguarded(library: Library, ctx: int) -> _Copy:
    """Return the copy by the calls that every libvfio-user has; a shortened file kills the process."""
    sg, iov = _ffi.scratch(library.function("dma_sg_size")()), _ffi.IoVec()
    to_sgl, get, put = (library.function(name) for name in ("vfu_addr_to_sgl", "vfu_sgl_get", "vfu_sgl_put"))
    read, write = library.function("vfu_sgl_read"), library.function("vfu_sgl_write")

    def copy(region: DmaRegion, guest: int, here: int, count: int, flags: int) -> int:
        is_write = bool(flags & _ffi.VFU_DMA_WRITE)
        if to_sgl(ctx, guest, count, sg, 1, _PROT_WRITE if is_write else _PROT_READ) != 1:
            return -1
        if not region.shared:
            # By its file where it has one that is not mapped (access mode file I/O), else by message.
            return int((write if is_write else read)(ctx, sg, 1, here, _ffi.SGL_DIRECT_ACCESS))
        if get(ctx, sg, iov, 1, 0) != 0:
            return -1
        mapped, ours = _ffi.view(iov.iov_base, count), _ffi.view(here, count)
        if is_write:
            mapped[:] = ours
        else:
            ours[:] = mapped
        if not flags & _ffi.VFU_DMA_UNLOGGED:
            put(ctx, sg, iov, 1)
        return 0

    return copy
