"""The migration half of a vfio-user client: DEVICE_FEATURE, MIG_DATA_READ and _WRITE, GET_PRECOPY_INFO.

Sources: QEMU's docs/interop/vfio-user.rst for what is published; native/spec/ for what the project adds.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.client.connection import Connection
from vfu_dev.client.frames import Buffer, Call, ClientCommandError
from vfu_dev.client.messages import ClientPrecopyInfo, Version
from vfu_dev.errors import ProtocolError
from vfu_dev.uapi import DeviceState, MigrationFlags

_GET, _SET, _PROBE = (
    uapi.VFIO_DEVICE_FEATURE_GET,
    uapi.VFIO_DEVICE_FEATURE_SET,
    uapi.VFIO_DEVICE_FEATURE_PROBE,
)


class ClientMigration:
    """Migration commands of one connection.

    A state change may take as long as the connection's timeout, like every other command.
    """

    def __init__(self, connection: Connection, version: Version, max_data_xfer_size: int) -> None:
        self._connection = connection
        self._version = version
        self.max_data_xfer_size = max_data_xfer_size

    # --- DEVICE_FEATURE -------------------------------------------------------------------------------------

    def feature(self, flags: int, data: Buffer = b"", *, reply_data_bytes: int | None = None) -> bytes:
        """Send DEVICE_FEATURE with `flags` (feature index and method bits).

        Args:    reply_data_bytes: exact size of the reply's data; None: that of the request's.
        Returns: the reply's data.
        """
        expected = len(data) if reply_data_bytes is None else reply_data_bytes
        argsz = messages.FEATURE.size + max(expected, len(data))
        reply = self._connection.call(
            uapi.VFIO_USER_DEVICE_FEATURE,
            messages.FEATURE.pack(argsz, flags),
            data,
            reply_bytes=messages.FEATURE.size + expected,
        )
        found = messages.parse_feature(reply.payload, flags, expected if flags & _GET else None)
        return bytes(found)

    def get(self, feature: int, data_bytes: int) -> bytes:
        """GET `feature`, whose data is `data_bytes` long."""
        return self.feature(feature | _GET, reply_data_bytes=data_bytes)

    def set(self, feature: int, data: Buffer = b"") -> bytes:
        """SET `feature` to `data`."""
        return self.feature(feature | _SET, data)

    def probe(self, feature: int, methods: int = 0) -> bool:
        """Return whether the server has `feature`, with all `methods` (GET and SET bits)."""
        try:
            self.feature(feature | methods | _PROBE)
        except ClientCommandError:
            return False
        return True

    def flags(self) -> MigrationFlags:
        """Return VFIO_DEVICE_FEATURE_MIGRATION; 0 where the server does not migrate.

        Raises: ProtocolError: it migrates without STOP_COPY, which the specification requires.
        """
        try:
            data = self.get(uapi.VFIO_DEVICE_FEATURE_MIGRATION, 8)
        except ClientCommandError:
            return MigrationFlags(0)
        value = int.from_bytes(data, "little")
        known = MigrationFlags(value & 0x7)
        if MigrationFlags.VFIO_MIGRATION_STOP_COPY not in known:
            raise ProtocolError(f"the server sent migration flags {value:#x} without STOP_COPY")
        return known

    def get_state(self) -> DeviceState:
        """Return the device's migration state."""
        data = self.get(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, 8)
        value = int.from_bytes(data[:4], "little")
        try:
            return DeviceState(value)
        except ValueError:
            raise ProtocolError(f"the server sent migration state {value}") from None

    def set_state(self, state: DeviceState) -> None:
        """Take the device to `state`; returns when it is there.

        Raises: ClientCommandError: refused or failed; `get_state` says where it is.
        """
        data = int(state).to_bytes(4, "little") + b"\xff\xff\xff\xff"  # data_fd is unused here
        self.set(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, data)

    def data_size(self) -> int:
        """Return stop_copy_length: bytes still to be read if the device stopped now (native/spec/)."""
        return int.from_bytes(self.get(uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, 8), "little")

    def enable_precopy_info_v2(self) -> None:
        """Opt in to VFIO_PRECOPY_INFO_REINIT (Linux 7.1)."""
        self.set(uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2)

    # --- the data -------------------------------------------------------------------------------------------

    @property
    def has_precopy_info(self) -> bool:
        """Whether the server announced MIG_GET_PRECOPY_INFO."""
        return self._version.precopy_info

    def precopy_info(self) -> ClientPrecopyInfo:
        """Return how many bytes PRE_COPY has to offer now (native/spec/).

        Raises: ClientCommandError: not in PRE_COPY (EINVAL).
        """
        request = messages.PRECOPY_INFO.pack(messages.PRECOPY_INFO.size, 0, 0, 0)
        reply = self._connection.call(
            uapi.VFIO_USER_MIG_GET_PRECOPY_INFO, request, reply_bytes=messages.PRECOPY_INFO.size
        )
        return messages.parse_precopy_info(reply.payload)

    def submit_read(self, buffer: memoryview) -> Call:
        """Ask for up to len(buffer) bytes of the stream; `finish_read` says how many came."""
        request = messages.MIG_DATA.pack(messages.MIG_DATA.size + len(buffer), len(buffer))
        return self._connection.submit(
            uapi.VFIO_USER_MIG_DATA_READ, request, reply_bytes=messages.MIG_DATA.size, into=buffer
        )

    def finish_read(self, call: Call) -> int:
        """Return how many bytes of the buffer were filled; 0: nothing now (PRE_COPY), the end (STOP_COPY)."""
        reply = self._connection.wait(call)
        argsz, size = messages.unpack(messages.MIG_DATA, reply.payload, "migration data head")
        # Upstream's libvfio-user pads a reply to the size that was asked for.
        padded = not self._version.precopy_info and size < reply.into_bytes == len(call.into)
        messages.require(
            (size == reply.into_bytes or padded) and argsz == messages.MIG_DATA.size + size,
            f"migration data of size {size}, argsz {argsz} with {reply.into_bytes} bytes of it",
        )
        return int(size)

    def read_into(self, buffer: bytearray | memoryview) -> int:
        """Read a slice of the stream into `buffer`, at most the transfer limit; see `finish_read`."""
        view = memoryview(buffer).cast("B")[: self.max_data_xfer_size]
        return self.finish_read(self.submit_read(view))

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes of the stream."""
        data = bytearray(min(count, self.max_data_xfer_size))
        return bytes(data[: self.read_into(data)])

    def submit_write(self, data: Buffer) -> Call:
        """Send a slice of the stream, at most the transfer limit; `finish_write` waits for the answer."""
        head = messages.MIG_DATA.pack(messages.MIG_DATA.size + len(data), len(data))
        return self._connection.submit(uapi.VFIO_USER_MIG_DATA_WRITE, head, data)

    def finish_write(self, call: Call) -> None:
        """Wait until the slice was taken."""
        self._connection.wait(call)

    def write(self, data: Buffer) -> None:
        """Send a slice of the stream of any size, in order."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self.max_data_xfer_size):
            self.finish_write(self.submit_write(view[start : start + self.max_data_xfer_size]))

    # --- DMA logging ----------------------------------------------------------------------------------------

    def dma_logging_start(self, ranges: Sequence[tuple[int, int]], page_size: int = 4096) -> int:
        """Log DMA writes to `ranges` of (iova, length); return the page size that the server tracks by."""
        head = messages.LOGGING_CONTROL.pack(page_size, len(ranges), 0)
        body = b"".join(messages.LOGGING_RANGE.pack(*one) for one in ranges)
        data = self.set(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, head + body)
        messages.require(
            len(data) >= messages.LOGGING_CONTROL.size, f"{len(data)} bytes of DMA logging reply"
        )
        found, count, _ = messages.LOGGING_CONTROL.unpack_from(data)
        messages.require(count == len(ranges), f"{count} DMA logging ranges, {len(ranges)} were asked for")
        messages.require(found > 0 and found & (found - 1) == 0, f"a DMA logging page size of {found}")
        return int(found)

    def dma_logging_stop(self) -> None:
        """Stop logging."""
        self.set(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP)

    def dma_logging_report(self, iova: int, length: int, page_size: int = 4096) -> bytes:
        """Return and clear the dirty bitmap of the range.

        Returns: little-endian u64 words, bit i for page i of `page_size` from `iova`.
        """
        pages = -(-length // page_size)
        bitmap_bytes = -(-pages // 64) * 8
        request = messages.LOGGING_REPORT.pack(iova, length, page_size)
        reply_bytes = len(request) + bitmap_bytes
        data = self.feature(
            uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT | _GET, request, reply_data_bytes=reply_bytes
        )
        messages.require(data[: len(request)] == request, "a DMA logging report about another range")
        bitmap = data[len(request) :]
        messages.require(
            int.from_bytes(bitmap, "little") >> pages == 0, "dirty bits outside of the range asked for"
        )
        return bitmap
