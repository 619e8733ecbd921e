"""The migration half of a vfio-user client: DEVICE_FEATURE, MIG_DATA_READ and _WRITE, GET_PRECOPY_INFO.

Sources: QEMU's docs/interop/vfio-user.rst for what is published; native/spec/ for what the project adds.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.client.connection import Connection
from vfu_dev.client.frames import Buffer, Call, ClientCommandError
from vfu_dev.client.messages import ClientPrecopyInfo, Version
from vfu_dev.client.window import DataWindow, Place
from vfu_dev.errors import ProtocolError
from vfu_dev.uapi import DeviceState, MigrationFlags

_GET, _SET, _PROBE = (
    uapi.VFIO_DEVICE_FEATURE_GET,
    uapi.VFIO_DEVICE_FEATURE_SET,
    uapi.VFIO_DEVICE_FEATURE_PROBE,
)

_PAGE = mmap.PAGESIZE


class ClientMigration:
    """Migration commands of one connection.

    A state change may take as long as the connection's timeout, like every other command.
    """

    def __init__(self, connection: Connection, version: Version, max_data_xfer_size: int) -> None:
        self._connection = connection
        self._version = version
        self.max_data_xfer_size = max_data_xfer_size
        self.window: DataWindow | None = None  # where migration data is, instead of in messages
        # Reads under way in it: what was asked for, and where the caller wants it if that is elsewhere.
        self._asked: dict[int, tuple[Place, memoryview | None]] = {}

    # --- DEVICE_FEATURE -------------------------------------------------------------------------------------

    def feature(self, flags: int, data: Buffer = b"", *, reply_data_bytes: int | None = None) -> bytes:
        """Send DEVICE_FEATURE with `flags` (feature index and method bits).

        Args: reply_data_bytes: exact size of the reply's data; None: that of the request's.
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

    def share(self, window: DataWindow) -> bool:
        """Have migration data in `window` from now on; False if the server does not take it.

        There can be one for each connection. A buffer that is not in it still works, one at a time: its
        content is copied.
        """
        if self.window is not None or window.size_bytes > self._version.data_window:
            return False
        request = messages.MIG_DATA_WINDOW.pack(messages.MIG_DATA_WINDOW.size, 0, window.size_bytes)
        try:
            self._connection.call(uapi.VFIO_USER_MIG_DATA_WINDOW, request, fds=[window.fd])
        except ClientCommandError:
            return False
        self.window = window
        window.users += 1
        return True

    def close(self) -> None:
        """Let go of the window; the connection has ended."""
        window, self.window = self.window, None
        if window is not None:
            window.leave()

    def _in_window(self, command: int, place: Place) -> Call:
        size = messages.MIG_DATA_IN_WINDOW.size
        request = messages.MIG_DATA_IN_WINDOW.pack(size, len(place), place.offset)
        is_read = command == uapi.VFIO_USER_MIG_DATA_READ
        return self._connection.submit(command, request, reply_bytes=size if is_read else 0)

    def submit_read(self, buffer: memoryview | Place) -> Call:
        """Ask for up to len(buffer) bytes of the stream; `finish_read` says how many came."""
        place = buffer if isinstance(buffer, Place) else Place.of(buffer)
        if self.window is not None:
            there = place if place.window is self.window else self.window.place(0, len(place))
            call = self._in_window(uapi.VFIO_USER_MIG_DATA_READ, there)
            self._asked[call.id] = there, None if there is place else place.view
            return call
        buffer = place.view
        request = messages.MIG_DATA.pack(messages.MIG_DATA.size + len(buffer), len(buffer))
        return self._connection.submit(
            uapi.VFIO_USER_MIG_DATA_READ, request, reply_bytes=messages.MIG_DATA.size, into=buffer
        )

    def finish_read(self, call: Call) -> int:
        """Return how many bytes of the buffer were filled; 0: nothing now (PRE_COPY), the end (STOP_COPY)."""
        if (asked := self._asked.pop(call.id, None)) is not None:
            return self._finish_in_window(call, *asked)
        reply = self._connection.wait(call)
        argsz, size = messages.unpack(messages.MIG_DATA, reply.payload, "migration data head")
        # Upstream's libvfio-user pads a reply to the size that was asked for.
        padded = not self._version.precopy_info and size < reply.into_bytes == len(call.into)
        messages.require(
            (size == reply.into_bytes or padded) and argsz == messages.MIG_DATA.size + size,
            f"migration data of size {size}, argsz {argsz} with {reply.into_bytes} bytes of it",
        )
        call.into = memoryview(b"")
        return int(size)

    def _finish_in_window(self, call: Call, place: Place, wanted: memoryview | None) -> int:
        reply = self._connection.wait(call)
        argsz, size, offset = messages.unpack(messages.MIG_DATA_IN_WINDOW, reply.payload, "migration data")
        messages.require(
            size <= len(place) and offset == place.offset and argsz == messages.MIG_DATA_IN_WINDOW.size,
            f"migration data of size {size} at {offset}, argsz {argsz}, {len(place)} at {place.offset} asked",
        )
        if wanted is not None:
            wanted[:size] = place.view[:size]
        return int(size)

    def read_into(self, buffer: bytearray | memoryview) -> int:
        """Read a slice of the stream into `buffer`, at most the transfer limit; see `finish_read`."""
        view = memoryview(buffer).cast("B")[: self.max_data_xfer_size]
        return self.finish_read(self.submit_read(view))

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes of the stream."""
        data = bytearray(min(count, self.max_data_xfer_size))
        return bytes(data[: self.read_into(data)])

    def submit_write(self, data: Buffer | Place) -> Call:
        """Send a slice of the stream, at most the transfer limit; `finish_write` waits for the answer."""
        place = data if isinstance(data, Place) else Place.of(memoryview(data))
        if self.window is not None:
            there = place
            if place.window is not self.window:
                there = self.window.place(0, len(place))
                there.view[:] = place.view
            return self._in_window(uapi.VFIO_USER_MIG_DATA_WRITE, there)
        data = place.view
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


def two_buffers(source: ClientMigration, destination: ClientMigration, size_bytes: int) -> list[Place]:
    """Return two buffers for a move, in a window of both servers if they take it: nothing is copied then."""
    window = source.window or destination.window or DataWindow(-(-2 * size_bytes // _PAGE) * _PAGE)
    try:
        taken = [side.window is window or side.share(window) for side in (source, destination)]
    finally:
        if not window.users:
            window.close()
    if not any(taken) or window.size_bytes < 2 * size_bytes:
        return [Place.of(memoryview(bytearray(size_bytes))) for _ in range(2)]
    return [window.place(0, size_bytes), window.place(size_bytes, size_bytes)]
