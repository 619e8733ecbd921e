"""A vfio-user device as its client sees it: negotiation, regions, interrupts, DMA, reset.

Migration is `device.migration` (vfu_dev/client/migration.py). Commands and their replies: QEMU's
docs/interop/vfio-user.rst. Requests are not checked here (a test must be able to ask for nonsense);
replies always are.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from typing import Self

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.client.connection import DEFAULT_TIMEOUT_SECONDS, Connection
from vfu_dev.client.dma import ClientDmaRegion, DmaSpace
from vfu_dev.client.frames import Buffer
from vfu_dev.client.messages import DeviceInfo, IrqInfo, RegionInfo, Version
from vfu_dev.client.migration import ClientMigration
from vfu_dev.client.transport import MAX_FDS
from vfu_dev.closing import Closing
from vfu_dev.errors import AccessError, ProtocolError


class RegionMapping(Closing):
    """A region's mappable areas, mapped; `areas` holds (offset in the region, memory)."""

    def __init__(self, info: RegionInfo, fd: int) -> None:
        self.areas: list[tuple[int, mmap.mmap]] = []
        try:
            # A file shorter than the area can be mapped, but an access kills with SIGBUS: check first.
            file_bytes = os.fstat(fd).st_size
            for offset, size in info.areas:
                position = info.offset + offset
                if position % mmap.ALLOCATIONGRANULARITY or position + size > file_bytes:
                    raise ProtocolError(
                        f"the server sent a file of {file_bytes} bytes for region {info.index}, whose area "
                        f"({offset}, {size}) begins at {position}"
                    )
                protection = mmap.PROT_READ | (mmap.PROT_WRITE if info.writable else 0)
                self.areas.append((offset, mmap.mmap(fd, size, prot=protection, offset=position)))
        except OSError as error:
            self.close()
            raise ProtocolError(f"region {info.index} cannot be mapped: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap."""
        while self.areas:
            self.areas.pop()[1].close()


class VfioUserDevice(Closing):
    """A device behind a vfio-user socket; negotiates at once.

    Args: connection: owned from here on.
          max_data_xfer_size: largest transfer to ask for (bytes); the server's own limit is kept as well,
          and 128 KiB where it does not offer migration_precopy_info.
    Raises: ProtocolError: the negotiation failed; the connection is closed.
    """

    def __init__(
        self, connection: Connection, *, max_data_xfer_size: int = uapi.VFIO_USER_DEF_MAX_XFER_BYTES
    ) -> None:
        self.connection = connection
        self.dma = DmaSpace()
        connection.handler = self.dma.handle
        try:
            self.version: Version = self._negotiate()
        except BaseException:
            connection.close()
            raise
        own_limit = min(max_data_xfer_size, messages.MAX_XFER_BYTES)
        if not self.version.precopy_info:  # a server that may be built on upstream's libvfio-user
            own_limit = min(own_limit, messages.ONE_RECEIVE_BYTES)
        self.max_data_xfer_size = min(own_limit, self.version.max_data_xfer_size)
        self.migration = ClientMigration(connection, self.version, self.max_data_xfer_size)
        self._regions: dict[int, RegionInfo] = {}

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_data_xfer_size: int = uapi.VFIO_USER_DEF_MAX_XFER_BYTES,
    ) -> Self:
        """Connect and negotiate.

        Raises: DisconnectedError: nobody listens there. ClientCommandError, ReplyTimeoutError: another
                client is attached; some servers say so (EBUSY), others let this run into its timeout.
        """
        connection = Connection.connect(path, timeout_seconds=timeout_seconds)
        return cls(connection, max_data_xfer_size=max_data_xfer_size)

    def close(self) -> None:
        """Close the connection and drop the DMA memory."""
        self.connection.close()
        self.migration.close()
        self.dma.close()

    def _negotiate(self) -> Version:
        capabilities = {
            "max_msg_fds": MAX_FDS,
            "max_data_xfer_size": self.dma.max_data_xfer_size,
            "migration": {"pgsize": 4096},
            "migration_precopy_info": True,
            "migration_data_window": messages.MAX_WINDOW_BYTES,
        }
        # The newline is white space to JSON; a control socket, which reads lines, answers at once for it.
        text = json.dumps({"capabilities": capabilities}).encode() + b"\n\0"
        reply = self.connection.call(
            uapi.VFIO_USER_VERSION,
            messages.VERSION.pack(0, 0) + text,
            reply_bytes=messages.VERSION.size + messages.MAX_VERSION_BYTES,
        )
        return messages.parse_version(reply.payload)

    # --- what there is --------------------------------------------------------------------------------------

    def info(self) -> DeviceInfo:
        """Return DEVICE_GET_INFO's answer."""
        request = messages.DEVICE_INFO.pack(messages.DEVICE_INFO.size, 0, 0, 0)
        reply = self.connection.call(
            uapi.VFIO_USER_DEVICE_GET_INFO, request, reply_bytes=messages.DEVICE_INFO.size
        )
        return messages.parse_device_info(reply.payload)

    def region_info(self, index: int) -> RegionInfo:
        """Return DEVICE_GET_REGION_INFO's answer, asked once."""
        if index not in self._regions:
            info, fds = self._query_region(index)
            for fd in fds:
                os.close(fd)
            self._regions[index] = info
        return self._regions[index]

    def map_region(self, index: int) -> RegionMapping:
        """Map what the server lets be mapped of region `index`.

        Raises: AccessError: nothing of it can be mapped.
        """
        info, fds = self._query_region(index)
        try:
            if not info.mappable:
                raise AccessError(f"region {index} cannot be mapped")
            return RegionMapping(info, fds[0])
        finally:
            for fd in fds:
                os.close(fd)

    def _query_region(self, index: int) -> tuple[RegionInfo, list[int]]:
        room = messages.REGION_INFO.size
        for _ in range(2):  # the second time with the room that the first answer asked for
            request = messages.REGION_INFO.pack(room, 0, index, 0, 0, 0)
            reply = self.connection.call(
                uapi.VFIO_USER_DEVICE_GET_REGION_INFO,
                request,
                reply_bytes=messages.MAX_REGION_INFO_BYTES,
                max_fds=MAX_FDS,
            )
            try:
                needed = messages.region_argsz(reply.payload, index)
                if needed <= room:
                    return messages.parse_region_info(reply.payload, index, len(reply.fds)), reply.fds
            except BaseException:
                for fd in reply.fds:
                    os.close(fd)
                raise
            for fd in reply.fds:
                os.close(fd)
            room = needed
        raise ProtocolError(f"the server asks for ever more room for info of region {index}")

    def irq_info(self, index: int) -> IrqInfo:
        """Return DEVICE_GET_IRQ_INFO's answer."""
        request = messages.IRQ_INFO.pack(messages.IRQ_INFO.size, 0, index, 0)
        reply = self.connection.call(
            uapi.VFIO_USER_DEVICE_GET_IRQ_INFO, request, reply_bytes=messages.IRQ_INFO.size
        )
        return messages.parse_irq_info(reply.payload, index)

    # --- regions --------------------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, count: int) -> bytearray:
        """Read `count` bytes, in as many messages as the transfer limit asks for."""
        data = bytearray(count)
        self.region_read_into(index, offset, data)
        return data

    def region_read_into(self, index: int, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from the region.

        Raises: ClientCommandError: the server refused; `buffer` may be filled in part.
        """
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), self.max_data_xfer_size):
            piece = view[start : start + self.max_data_xfer_size]
            request = messages.REGION_ACCESS.pack(offset + start, index, len(piece))
            reply = self.connection.call(
                uapi.VFIO_USER_REGION_READ, request, reply_bytes=messages.REGION_ACCESS.size, into=piece
            )
            messages.check_access(reply.payload, offset + start, index, len(piece))
            messages.require(
                reply.into_bytes == len(piece), f"{reply.into_bytes} bytes for a read of {len(piece)}"
            )

    def region_write(self, index: int, offset: int, data: Buffer, *, posted: bool = False) -> None:
        """Write `data`; posted writes are not answered, so their errors stay unknown."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self.max_data_xfer_size):
            piece = view[start : start + self.max_data_xfer_size]
            head = messages.REGION_ACCESS.pack(offset + start, index, len(piece))
            if posted:
                self.connection.post(uapi.VFIO_USER_REGION_WRITE, head, piece)
                continue
            reply = self.connection.call(
                uapi.VFIO_USER_REGION_WRITE, head, piece, reply_bytes=messages.REGION_ACCESS.size
            )
            messages.check_access(reply.payload, offset + start, index, len(piece))

    def reset(self) -> None:
        """DEVICE_RESET."""
        self.connection.call(uapi.VFIO_USER_DEVICE_RESET)

    # --- interrupts -----------------------------------------------------------------------------------------

    def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: Buffer = b"", fds: Sequence[int] = ()
    ) -> None:
        """DEVICE_SET_IRQS as it is; at most `version.max_msg_fds` file descriptors."""
        argsz = messages.IRQ_SET.size + len(data)
        head = messages.IRQ_SET.pack(argsz, flags, index, start, count)
        self.connection.call(uapi.VFIO_USER_DEVICE_SET_IRQS, head, data, fds=fds)

    def enable_irqs(self, index: int, count: int) -> list[int]:
        """Give the first `count` interrupts of type `index` an eventfd each.

        Returns: eventfds (non-blocking) that the caller closes.
        """
        flags = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        try:
            for start in range(0, count, self.version.max_msg_fds):
                some = eventfds[start : start + self.version.max_msg_fds]
                self.set_irqs(index, flags, start, len(some), fds=some)
        except BaseException:
            for fd in eventfds:
                os.close(fd)
            raise
        return eventfds

    def disable_irqs(self, index: int) -> None:
        """Disable all interrupts of type `index`."""
        self.set_irqs(index, uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0)

    def trigger_irq(self, index: int, number: int) -> None:
        """Have the server raise interrupt `number` of type `index`."""
        self.set_irqs(index, uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER, number, 1)

    # --- DMA ------------------------------------------------------------------------------------------------

    def dma_map(
        self,
        iova: int,
        size_bytes: int,
        *,
        flags: int = uapi.VFIO_DMA_MAP_FLAG_READ | uapi.VFIO_DMA_MAP_FLAG_WRITE,
        shared: bool = True,
    ) -> ClientDmaRegion:
        """Give the server new zeroed memory at `iova`, through a memfd or (not `shared`) through messages."""
        region = self.dma.create(iova, size_bytes, flags, shared)
        request = messages.DMA_MAP.pack(messages.DMA_MAP.size, flags, 0, iova, size_bytes)
        try:
            self.connection.call(uapi.VFIO_USER_DMA_MAP, request, fds=[region.fd] if shared else [])
        except BaseException:
            region.close()
            raise
        self.dma.regions[iova] = region
        return region

    def dma_unmap(self, region: ClientDmaRegion) -> None:
        """Take `region` back; its memory is gone afterwards."""
        request = messages.DMA_UNMAP.pack(messages.DMA_UNMAP.size, 0, region.iova, region.size_bytes)
        reply = self.connection.call(uapi.VFIO_USER_DMA_UNMAP, request, reply_bytes=messages.DMA_UNMAP.size)
        fields = messages.unpack(messages.DMA_UNMAP, reply.payload, "DMA_UNMAP reply")
        messages.require(
            fields[2:] == (region.iova, region.size_bytes), f"a DMA_UNMAP reply about {fields[2:]}"
        )
        del self.dma.regions[region.iova]
        region.close()
