"""The memory of a device as its client can write it: by REGION_WRITE, or mapped."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vfu_dev import uapi
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.digest import memory_region
from vfu_dev.client.frames import Call
from vfu_dev.client.messages import REGION_ACCESS
from vfu_dev.device.reference.layout import REGISTER_ID, REGISTERS
from vfu_dev.errors import ConfigError, ProtocolError
from vfu_dev.workload import ArrayWriter, Writes, contents
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES

# Requests under way at once: the server works while the next ones are made and sent.
_DEPTH = 32


class MemoryInfo:
    """What there is to write.

    Attributes:
        index: of the region.
        size_bytes: of the memory behind it, which may be less than the region.
        page_bytes: unit of its dirty tracking.
        mappable: whether it can be mapped.
    """

    def __init__(self, device: VfioUserDevice, index: int | None = None) -> None:
        """Ask the device; the largest BAR unless `index` names one.

        Raises: ConfigError: nothing there that can be written.
        """
        self.index = memory_region(device) if index is None else index
        info = device.region_info(self.index)
        if not info.writable or not info.size_bytes:
            raise ConfigError(f"region {self.index} of the device cannot be written")
        self.size_bytes, self.page_bytes, self.mappable = (
            info.size_bytes,
            DEFAULT_PAGE_BYTES,
            info.mappable,
        )
        registers = device.region_info(uapi.VFIO_PCI_BAR0_REGION_INDEX)
        if self.index != uapi.VFIO_PCI_BAR2_REGION_INDEX or registers.size_bytes < 4096:
            return
        # The reference device says how much of its BAR is memory, and in which pages.
        if _register(device, "id") == REGISTER_ID:
            memory, page = _register(device, "memsize"), _register(device, "page_size")
            if not 0 < memory <= info.size_bytes or page < 64 or page & (page - 1) or memory % page:
                raise ProtocolError(f"the device claims {memory} bytes of memory in pages of {page}")
            self.size_bytes, self.page_bytes = memory, page


def _register(device: VfioUserDevice, name: str) -> int:
    field = REGISTERS[name]
    found = device.region_read(uapi.VFIO_PCI_BAR0_REGION_INDEX, field.offset, field.size_bytes)
    return int.from_bytes(found, "little")


class Target(Protocol):
    """Makes writes."""

    def write(self, writes: Writes, first: int, count: int) -> int:
        """Make the writes from number `first`; returns the bytes written, once the device has them all."""

    def close(self) -> None:
        """Let go of what was made for it."""


class MappedTarget:
    """Mapped memory: a write is a store of the CPU, without a message."""

    def __init__(self, device: VfioUserDevice, memory: MemoryInfo) -> None:
        self._mapping = device.map_region(memory.index)
        offset, area = next(iter(self._mapping.areas), (0, None))
        if area is None or offset or len(area) < memory.size_bytes:
            self._mapping.close()
            raise ConfigError(f"region {memory.index} cannot be mapped as a whole")
        self._data: npt.NDArray[np.uint8] | None = np.frombuffer(
            area, dtype=np.uint8, count=memory.size_bytes
        )
        self._page_bytes = memory.page_bytes
        self._writers: dict[int, ArrayWriter] = {}

    def write(self, writes: Writes, first: int, count: int) -> int:
        """See `Target`."""
        assert self._data is not None
        writer = self._writers.get(id(writes))
        if writer is None:
            writer = self._writers[id(writes)] = ArrayWriter(self._data, self._page_bytes, writes)
        return writer.write(first, count)[0]

    def close(self) -> None:
        """Unmap."""
        self._writers.clear()
        self._data = None
        self._mapping.close()


class MessageTarget:
    """Memory behind REGION_WRITE, several messages under way at once."""

    def __init__(self, device: VfioUserDevice, memory: MemoryInfo) -> None:
        self._device = device
        self._index = memory.index

    def write(self, writes: Writes, first: int, count: int) -> int:
        """See `Target`."""
        offsets, lengths = writes.offsets(first, count).tolist(), writes.lengths(first, count).tolist()
        size = writes.write_bytes
        rows = None if size is None else contents(writes.seed, first, count, size)
        device, connection = self._device, self._device.connection
        waiting: deque[Call] = deque()
        for number, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            row = contents(writes.seed, first + number, 1, length)[0] if rows is None else rows[number]
            data = np.ascontiguousarray(row).data
            if length > device.max_data_xfer_size:
                device.region_write(self._index, offset, data)
                continue
            if len(waiting) == _DEPTH:
                connection.wait(waiting.popleft())
            head = REGION_ACCESS.pack(offset, self._index, length)
            waiting.append(
                connection.submit(uapi.VFIO_USER_REGION_WRITE, head, data, reply_bytes=REGION_ACCESS.size)
            )
        for call in waiting:
            connection.wait(call)
        return sum(lengths)

    def close(self) -> None:
        """Nothing to let go of."""


def target_of(device: VfioUserDevice, memory: MemoryInfo, access: str) -> Target:
    """Return the target of that access: `auto` (mapped where that is possible), `mmap` or `trap`.

    Raises: ConfigError, AccessError: it cannot be mapped.
    """
    mapped = access == "mmap" or (access == "auto" and memory.mappable)
    return MappedTarget(device, memory) if mapped else MessageTarget(device, memory)


def read_memory(device: VfioUserDevice, memory: MemoryInfo) -> npt.NDArray[np.uint8]:
    """Return all bytes of the memory, shape (size_bytes,), read by REGION_READ."""
    held = np.empty(memory.size_bytes, dtype=np.uint8)
    view = held.data
    step = device.max_data_xfer_size
    for start in range(0, len(view), step):
        device.region_read_into(memory.index, start, view[start : start + step])
    return held
