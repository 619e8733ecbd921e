"""The honest device behind a lying server: a small PCI device that keeps to the specification.

64 KiB of memory in BAR2, MSI-X, migration with PRE_COPY. It refuses what the specification or
`<linux/vfio.h>` requires to be refused, so that the lie is the only error. It shares no code with
`vfu-dev serve` or libvfio-user: it is an independent third implementation.

Layouts follow QEMU's docs/interop/vfio-user.rst; 19 and 27 are native/spec/'s additions.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import zlib
from collections.abc import Callable

from vfu_dev import uapi
from vfu_dev.device.reference.layout import DEVICE_ID, VENDOR_ID
from vfu_dev.hostile.message import COMMANDS, FEATURES, RefusedError, Request
from vfu_dev.hostile.window import MAX_WINDOW, map_window, place_of
from vfu_dev.uapi import DeviceState

GET, SET, PROBE = (
    uapi.VFIO_DEVICE_FEATURE_GET,
    uapi.VFIO_DEVICE_FEATURE_SET,
    uapi.VFIO_DEVICE_FEATURE_PROBE,
)
_METHODS = {"migration": GET, "state": GET | SET, "log-report": GET, "data-size": GET}  # others: SET

MEMORY_BYTES = 64 << 10
TRAILER_BYTES = 4 << 10  # of which the first 4 are a CRC-32 of the memory
MSIX_VECTORS = 4
MAX_XFER = 1 << 20
MAX_MAPS = 65535
REGION_BYTES = {0: 4096, 2: MEMORY_BYTES, 4: 4096, 7: 256}
IRQ_COUNTS = {0: 0, 1: 0, 2: MSIX_VECTORS, 3: 0, 4: 0}
SPARSE_REGION, SPARSE_BYTES, SPARSE_OFFSET = 5, 8192, 4096  # one area, its second page

DELAY_SECONDS = 6.0  # of lies that come late: more than QEMU waits, 5 s

S = DeviceState
_PRE_COPY = (S.PRE_COPY, S.PRE_COPY_P2P)
_SAVING = (*_PRE_COPY, S.STOP_COPY)


def _require(condition: bool, number: int = errno.EINVAL) -> None:
    if not condition:
        raise RefusedError(number)


def _config_space() -> bytearray:
    """PCI type 0 header: BAR0 32-bit, BAR2 64-bit prefetchable, BAR4 with the MSI-X table and PBA."""
    config = bytearray(256)
    struct.pack_into("<HHHHBBBB", config, 0, VENDOR_ID, DEVICE_ID, 0, 0x0010, 1, 0x00, 0x80, 0x08)
    struct.pack_into("<6I", config, 0x10, 0x0, 0, 0xC, 0, 0x0, 0)
    struct.pack_into("<HH", config, 0x2C, VENDOR_ID, DEVICE_ID)
    config[0x34] = 0x40
    struct.pack_into("<BBHII", config, 0x40, 0x11, 0, MSIX_VECTORS - 1, 0x000 | 4, 0x800 | 4)
    return config


class Device:
    """The honest device. Migration: memory as initial data, a trailer in STOP_COPY.

    Args: p2p: whether it has the P2P states.
          sparse: whether it has a region of two pages, the second of which can be mapped.
          window: whether it takes a window for migration data.
    """

    def __init__(self, *, p2p: bool = False, sparse: bool = False, window: bool = False) -> None:
        pattern = bytes(range(256)) * (MEMORY_BYTES // 256)
        self.regions = {index: bytearray(size) for index, size in REGION_BYTES.items()}
        self.regions[2][:] = pattern
        self.regions[7] = _config_space()
        self.states = [S.STOP, S.RUNNING, S.STOP_COPY, S.RESUMING, S.PRE_COPY]
        self.migration_flags = 0x5
        if p2p:
            self.states += [S.RUNNING_P2P, S.PRE_COPY_P2P]
            self.migration_flags |= 0x2
        if sparse:
            self.regions[SPARSE_REGION] = bytearray(SPARSE_BYTES)
        self.state = S.RUNNING
        self.pending = bytearray()
        self.incoming = bytearray()
        self.queries = 0  # how often sizes were asked for; growing lies use it
        self.delay_seconds = DELAY_SECONDS
        self.has_precopy_info = True
        self.negotiated = False
        self.offers_window = window
        self.window: memoryview | None = None
        self.logging = False
        self.mappings: dict[int, int] = {}  # iova -> size
        self.eventfds: dict[tuple[int, int], int] = {}
        self.fds: list[int] = []  # that came with the request being answered

    def disconnect(self) -> None:
        """Forget the client: its mappings, its eventfds, what it had begun."""
        for fd in self.eventfds.values():
            os.close(fd)
        self.eventfds.clear()
        self.mappings.clear()
        self.negotiated = self.logging = False
        self.window = None
        self.state = S.RUNNING

    def answer(self, request: Request) -> tuple[bytes, list[int]]:
        """Return reply payload and fds, or raise RefusedError."""
        for name, number in COMMANDS.items():
            if number == request.command:
                _require(self.negotiated or name == "version")
                handler: Callable[[bytes], bytes] = getattr(self, name.replace("-", "_"))
                self.fds = request.fds
                try:
                    payload = handler(request.payload)
                except struct.error:
                    raise RefusedError(errno.EINVAL) from None
                return payload, self._reply_fds(request)
        raise RefusedError(errno.ENOSYS)

    def version(self, payload: bytes) -> bytes:
        """Our limits, in less text than QEMU proposes: it reuses its request as the reply buffer."""
        major, _ = struct.unpack_from("<HH", payload)
        _require(major == 0)
        proposed = {}
        if data := payload[4:]:
            try:
                proposed = json.loads(data.rstrip(b"\0")).get("capabilities", {})
                _require(isinstance(proposed, dict))
            except (ValueError, RecursionError, AttributeError):
                raise RefusedError(errno.EINVAL) from None
        capabilities = {
            "max_msg_fds": 8,
            "max_data_xfer_size": MAX_XFER,
            "migration": {"pgsize": 4096},
            "migration_precopy_info": True,
            "write_multiple": True,
        } | ({"migration_data_window": MAX_WINDOW} if self.offers_window else {})
        self.negotiated = True
        offered = {name: value for name, value in capabilities.items() if name in proposed}
        return struct.pack("<HH", 0, 0) + json.dumps({"capabilities": offered}).encode() + b"\0"

    # --- DMA ------------------------------------------------------------------------------------------------

    def dma_map(self, payload: bytes) -> bytes:
        """Keep account of every mapping and use none."""
        _, flags, offset, iova, size = struct.unpack_from("<IIQQQ", payload)
        _require(not flags & ~0xF and size > 0 and iova + size <= 1 << 64)
        _require(not flags & 0xC or bool(self.fds))  # an access mode that needs a file
        if self.fds:
            _require(offset + size <= os.fstat(self.fds[0]).st_size)
        overlaps = any(iova < at + length and at < iova + size for at, length in self.mappings.items())
        _require(not overlaps, errno.EEXIST)
        _require(len(self.mappings) < MAX_MAPS, errno.ENOSPC)
        self.mappings[iova] = size
        return b""

    def dma_unmap(self, payload: bytes) -> bytes:
        """Answer with the request."""
        _, flags, iova, size = struct.unpack_from("<IIQQ", payload)
        if flags & uapi.VFIO_DMA_UNMAP_FLAG_ALL:
            self.mappings.clear()
        else:
            _require(self.mappings.get(iova) == size, errno.ENOENT)
            del self.mappings[iova]
        return payload

    # --- what there is --------------------------------------------------------------------------------------

    def get_info(self, payload: bytes) -> bytes:
        """PCI, resettable, 9 regions, 5 interrupt types."""
        argsz, *_ = struct.unpack_from("<4I", payload)
        _require(argsz >= 16)
        return struct.pack("<4I", 16, 0x3, 9, len(IRQ_COUNTS))

    def region_info(self, payload: bytes) -> bytes:
        """Readable and writable, trapped, no capabilities but of the sparse region."""
        argsz, _, index, _ = struct.unpack_from("<4I", payload)
        _require(argsz >= 32 and index < 9)
        size = len(self.regions.get(index, b""))
        if index != SPARSE_REGION or not size:
            return struct.pack("<4IQQ", 32, 0x3 if size else 0, index, 0, size, 0)
        area = struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, SPARSE_OFFSET, SPARSE_BYTES - SPARSE_OFFSET)
        needed = 32 + len(area)
        room = argsz >= needed
        head = struct.pack("<4IQQ", needed, 0xF, index, 32 if room else 0, size, 0)
        return head + (area if room else b"")

    def _reply_fds(self, request: Request) -> list[int]:
        """Return the file of the sparse region, where it was asked about."""
        if request.command != COMMANDS["region-info"] or SPARSE_REGION not in self.regions:
            return []
        if struct.unpack_from("<I", request.payload, 8)[0] != SPARSE_REGION:
            return []
        fd = os.memfd_create("vfu-dev-sparse", os.MFD_CLOEXEC)
        os.ftruncate(fd, SPARSE_BYTES)
        return [fd]

    def irq_info(self, payload: bytes) -> bytes:
        """MSI-X only."""
        argsz, _, index, _ = struct.unpack_from("<4I", payload)
        _require(argsz >= 16 and index in IRQ_COUNTS)
        return struct.pack("<4I", 16, 0x9 if IRQ_COUNTS[index] else 0, index, IRQ_COUNTS[index])

    # --- interrupts -----------------------------------------------------------------------------------------

    def set_irqs(self, payload: bytes) -> bytes:
        """Eventfds, and triggers by the client; masks are accepted and forgotten."""
        _, flags, index, start, count = struct.unpack_from("<5I", payload)
        _require(index in IRQ_COUNTS and start + count <= IRQ_COUNTS[index])
        if not flags & uapi.VFIO_IRQ_SET_ACTION_TRIGGER:
            return b""
        vectors = [(index, number) for number in range(start, start + count)]
        if flags & uapi.VFIO_IRQ_SET_DATA_EVENTFD:
            self._drop(vectors)
            for vector, fd in zip(vectors, self.fds, strict=False):
                self.eventfds[vector] = os.dup(fd)
        elif flags & uapi.VFIO_IRQ_SET_DATA_BOOL:
            wanted = payload[20 : 20 + count]
            _require(len(wanted) == count)
            self._trigger([vector for vector, yes in zip(vectors, wanted, strict=True) if yes])
        elif count:
            self._trigger(vectors)
        else:
            self._drop([vector for vector in self.eventfds if vector[0] == index])
        return b""

    def _drop(self, vectors: list[tuple[int, int]]) -> None:
        for vector in vectors:
            if vector in self.eventfds:
                os.close(self.eventfds.pop(vector))

    def _trigger(self, vectors: list[tuple[int, int]]) -> None:
        for vector in vectors:
            if vector in self.eventfds:
                with contextlib.suppress(OSError):
                    os.write(self.eventfds[vector], struct.pack("<Q", 1))

    # --- regions --------------------------------------------------------------------------------------------

    def region_read(self, payload: bytes) -> bytes:
        """Bounds-checked, as the lies are to be the only fault."""
        offset, index, count = struct.unpack_from("<QII", payload)
        data = self._slice(index, offset, count)
        return struct.pack("<QII", offset, index, count) + bytes(data)

    def region_write(self, payload: bytes) -> bytes:
        """Store as it comes; config BAR bits are the client's to emulate."""
        offset, index, count = struct.unpack_from("<QII", payload)
        data = payload[16 : 16 + count]
        _require(len(data) == count)
        self._slice(index, offset, count)[:] = data
        return struct.pack("<QII", offset, index, count)

    def write_multi(self, payload: bytes) -> bytes:
        """Store each; the answer is how many there were."""
        (number,) = struct.unpack_from("<Q", payload)
        _require(len(payload) == 8 + 24 * number)
        for at in range(8, len(payload), 24):
            offset, index, count = struct.unpack_from("<QII", payload, at)
            _require(count <= 8)
            self._slice(index, offset, count)[:] = payload[at + 16 : at + 16 + count]
        return payload[:8]

    def _slice(self, index: int, offset: int, count: int) -> memoryview:
        region = self.regions.get(index)
        if region is None or count > MAX_XFER or offset > len(region) or count > len(region) - offset:
            raise RefusedError(errno.EINVAL)
        return memoryview(region)[offset : offset + count]

    def reset(self, payload: bytes) -> bytes:
        """Back to RUNNING, as after a failed arc."""
        self.state = S.RUNNING
        return b""

    # --- migration ------------------------------------------------------------------------------------------

    def feature(self, payload: bytes) -> bytes:
        """DEVICE_FEATURE: migration, state, data size and DMA logging."""
        argsz, flags = struct.unpack_from("<II", payload)
        index, data = flags & uapi.VFIO_DEVICE_FEATURE_MASK, payload[8:]
        name = next((name for name, number in FEATURES.items() if number == index), None)
        if name is None:
            raise RefusedError(errno.ENOTTY)
        methods = flags & (GET | SET)
        _require(not methods & ~_METHODS.get(name, SET))
        if flags & PROBE:
            return payload
        _require(methods in (GET, SET))
        _require(argsz >= len(payload))
        if methods == SET:
            self._set(name, data)
            return payload
        answer: bytes = getattr(self, f"_get_{name.replace('-', '_')}")(data)
        _require(argsz >= 8 + len(answer))
        return struct.pack("<II", 8 + len(answer), flags) + answer

    def _set(self, name: str, data: bytes) -> None:
        if name == "state":
            self._enter(struct.unpack_from("<II", data)[0])
        elif name == "log-start":
            _, count, _ = struct.unpack_from("<QII", data)
            # The kernel's structure has a pointer behind these 16 bytes: 24, whatever the ranges.
            _require(len(data) == 16 + 16 * count or len(data) == 24)
            _require(not self.logging)
            self.logging = True
        elif name == "log-stop":
            self.logging = False

    def _get_migration(self, data: bytes) -> bytes:
        return struct.pack("<Q", self.migration_flags)

    def _get_state(self, data: bytes) -> bytes:
        return struct.pack("<II", self.state, 0xFFFFFFFF)

    def _get_data_size(self, data: bytes) -> bytes:
        self.queries += 1
        if self.state not in _SAVING:
            return struct.pack("<Q", MEMORY_BYTES + TRAILER_BYTES)
        return struct.pack("<Q", len(self.pending) + (TRAILER_BYTES if self.state in _PRE_COPY else 0))

    def _get_log_report(self, data: bytes) -> bytes:
        _, length, page_size = struct.unpack_from("<QQQ", data)
        _require(self.logging and page_size > 0 and page_size & (page_size - 1) == 0)
        pages = -(-length // page_size)
        _require(pages <= 8 * MAX_XFER)
        return data[:24] + bytes(8 * -(-pages // 64))

    def mig_read(self, payload: bytes) -> bytes:
        """Slices of the stream; empty when there is no more."""
        _, size = struct.unpack_from("<II", payload)
        _require(self.state in _SAVING)
        if self.window is not None:
            place, offset = place_of(self.window, payload)
            data = bytes(self.pending[: len(place)])
            place[: len(data)] = data
            del self.pending[: len(data)]
            return struct.pack("<IIQ", 16, len(data), offset)
        _require(size <= MAX_XFER)
        data = bytes(self.pending[:size])
        del self.pending[: len(data)]
        return struct.pack("<II", 8 + len(data), len(data)) + data

    def mig_write(self, payload: bytes) -> bytes:
        """Take what comes until it cannot be a stream of ours any more."""
        _, size = struct.unpack_from("<II", payload)
        data = payload[8:]
        if self.window is not None:
            data = bytes(place_of(self.window, payload)[0])
        _require(self.state == S.RESUMING and size == len(data))
        _require(len(self.incoming) + size <= 2 * MAX_XFER, errno.ENOSPC)
        self.incoming += data
        return b""

    def mig_window(self, payload: bytes) -> bytes:
        """Take the window, once."""
        _require(self.offers_window)
        _require(self.window is None, errno.EEXIST)
        self.window = map_window(payload, self.fds)
        return b""

    def precopy_info(self, payload: bytes) -> bytes:
        """All that is left counts as initial data; nothing gets dirty."""
        struct.unpack_from("<IIQQ", payload)
        _require(self.has_precopy_info and self.state in _PRE_COPY)
        self.queries += 1
        return struct.pack("<IIQQ", 24, 0, len(self.pending), 0)

    def _enter(self, number: int) -> None:
        _require(number in self.states and self.state != S.ERROR)
        state = S(number)
        if state is self.state:
            return
        _require(not (self.state is S.STOP_COPY and state in _PRE_COPY))
        if self.state is S.RESUMING:
            self._load()
        if state in _SAVING and self.state not in _SAVING:
            self.pending = bytearray(self.regions[2])
        if state is S.STOP_COPY:
            checksum = struct.pack("<I", zlib.crc32(self.regions[2]))
            self.pending += checksum.ljust(TRAILER_BYTES, b"\0")
        elif state is S.RESUMING:
            self.incoming = bytearray()
        self.state = state

    def _load(self) -> None:
        memory, trailer = self.incoming[:MEMORY_BYTES], self.incoming[MEMORY_BYTES:]
        checksum = struct.pack("<I", zlib.crc32(memory)).ljust(TRAILER_BYTES, b"\0")
        if trailer != checksum:
            self.state = S.ERROR
            raise RefusedError(errno.EINVAL)
        self.regions[2][:] = memory
        self.state = S.STOP
