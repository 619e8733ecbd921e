"""Client memory that the server may reach: through a file descriptor, or by DMA_READ and DMA_WRITE."""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.client.frames import Buffer
from vfu_dev.errors import AccessError, ProtocolError


class DmaAccessError(AccessError):
    """The server asked for memory that is not mapped for it so; the server gets `errno`."""

    def __init__(self, number: int, address: int, count: int) -> None:
        self.errno = number
        self.address = address
        self.count = count
        super().__init__(f"the server may not access {count} bytes at {address:#x}: {os.strerror(number)}")


@dataclass
class ClientDmaRegion:
    """One mapping. `memory` is the client's view of it, for as long as it is mapped.

    `shared` regions are reached by the server through the memfd; others only through messages.
    """

    iova: int
    memory: mmap.mmap
    fd: int
    flags: int
    shared: bool

    @property
    def size_bytes(self) -> int:
        """Size of the mapping."""
        return len(self.memory)

    def close(self) -> None:
        """Unmap and close on this side."""
        self.memory.close()
        os.close(self.fd)


class DmaSpace:
    """The client's DMA address space; answers the server's DMA_READ and DMA_WRITE on the connection."""

    def __init__(self, max_data_xfer_size: int = uapi.VFIO_USER_DEF_MAX_XFER_BYTES) -> None:
        self.max_data_xfer_size = max_data_xfer_size
        self.regions: dict[int, ClientDmaRegion] = {}
        self.read_requests = 0
        self.write_requests = 0

    def create(self, iova: int, size_bytes: int, flags: int, shared: bool) -> ClientDmaRegion:
        """Return new zeroed memory for `iova`, not yet part of the space."""
        fd = os.memfd_create("vfu-dev-dma", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            memory = mmap.mmap(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise
        return ClientDmaRegion(iova, memory, fd, flags, shared)

    def close(self) -> None:
        """Drop every region."""
        while self.regions:
            self.regions.popitem()[1].close()

    def handle(self, command: int, payload: memoryview) -> tuple[Buffer, ...]:
        """Answer one request of the server.

        Raises: DmaAccessError: not mapped, wrong direction or too long; ProtocolError: not a DMA request.
        """
        if command == uapi.VFIO_USER_DMA_READ:
            return self._read(payload)
        if command == uapi.VFIO_USER_DMA_WRITE:
            return self._write(payload)
        error = ProtocolError(f"the server sent command {command}, which is no server's")
        error.errno = errno.ENOSYS
        raise error

    def _read(self, payload: memoryview) -> tuple[Buffer, ...]:
        if len(payload) != messages.DMA_ACCESS.size:
            raise DmaAccessError(errno.EINVAL, 0, len(payload))
        address, count = messages.DMA_ACCESS.unpack(payload)
        view = self._view(address, count, uapi.VFIO_DMA_MAP_FLAG_READ)
        self.read_requests += 1
        return bytes(payload), bytes(view)

    def _write(self, payload: memoryview) -> tuple[Buffer, ...]:
        if len(payload) < messages.DMA_ACCESS.size:
            raise DmaAccessError(errno.EINVAL, 0, len(payload))
        address, count = messages.DMA_ACCESS.unpack_from(payload)
        data = payload[messages.DMA_ACCESS.size :]
        if len(data) != count:
            raise DmaAccessError(errno.EINVAL, address, count)
        self._view(address, count, uapi.VFIO_DMA_MAP_FLAG_WRITE)[:] = data
        self.write_requests += 1
        # The specification's table gives the reply's count 4 bytes, its text and libvfio-user 8: 8 it is.
        return (messages.DMA_ACCESS.pack(address, count),)

    def _view(self, address: int, count: int, flag: int) -> memoryview:
        """Return the bytes, if one region holds them all and allows it."""
        if count > self.max_data_xfer_size:
            raise DmaAccessError(errno.E2BIG, address, count)
        for region in self.regions.values():
            start = address - region.iova
            if 0 <= start <= region.size_bytes and count <= region.size_bytes - start:
                if not region.flags & flag:
                    raise DmaAccessError(errno.EPERM, address, count)
                return memoryview(region.memory)[start : start + count]
        raise DmaAccessError(errno.EFAULT, address, count)
