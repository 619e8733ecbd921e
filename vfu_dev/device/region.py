"""Memory of a device, behind a BAR or private to the device."""

from __future__ import annotations

from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from vfu_dev.device.bar import NO_BAR, Bar, Handler, Owner, Unmade
from vfu_dev.errors import ConfigError, VfuDevError
from vfu_dev.memory import DeviceMemory
from vfu_dev.uapi import PCI_BASE_ADDRESS_MEM_PREFETCH, PCI_BASE_ADDRESS_MEM_TYPE_64

_MIN_BAR_BYTES = 4096


class OutsideRegionError(VfuDevError, IndexError):
    """A device's own access to a region that does not lie inside: a defect of the device, not of a guest.

    Attributes:
        region: its name.
        offset, count: what was asked for, in bytes.
    """

    def __init__(self, region: Region, offset: int, count: int) -> None:
        super().__init__(f"{region.name}: {count} bytes at {offset:#x} of {region.size_bytes}")
        self.region = region.name
        self.offset = offset
        self.count = count


class Region(Bar):
    """Memory behind a BAR. The guest reads and writes it, unless the device's `region_read` and
    `region_write` say otherwise; a device reset leaves it alone, like the memory of a graphics card.

    The BAR is 64-bit and prefetchable, so it takes two BAR registers. Behind the end of the memory reads give
    0xff, as from a bus without a device, and writes are dropped. A BAR that is smaller shows a window.

    Args:
        index: of the BAR; `NO_BAR` for memory that only the device itself reaches.
        size_bytes: a multiple of the page size.
        page_size_bytes: unit of dirty tracking.
        migrate: whether the content is part of the device's state.
        mapped: the guest reaches the memory directly, and the device does not see the accesses; a migration
            finds changes by scanning (`vfu_dev.memory.Fingerprints`).
        bar_bytes: size of the BAR, a power of two; the memory's, rounded up, unless given.

    Attributes:
        memory: the memory, page by page; of a device's own.
        window: `base_bytes` for C to read, shape (1,) uint64; of a device's own.

    Raises: ConfigError: an impossible BAR. The device itself checks the memory when it is made.
    """

    bar_flags = PCI_BASE_ADDRESS_MEM_TYPE_64 | PCI_BASE_ADDRESS_MEM_PREFETCH
    memory: DeviceMemory = cast(Any, Unmade())
    window: npt.NDArray[np.uint64] = cast(Any, Unmade())

    def __init__(
        self,
        index: int,
        *,
        size_bytes: int,
        page_size_bytes: int = 4096,
        migrate: bool = True,
        mapped: bool = False,
        bar_bytes: int | None = None,
    ) -> None:
        whole = max(_MIN_BAR_BYTES, 1 << (size_bytes - 1).bit_length())
        if mapped and bar_bytes not in (None, whole):
            raise ConfigError(f"BAR{index}: mapped memory of {size_bytes} bytes has a BAR of {whole}")
        super().__init__(index, bar_bytes or whole)
        self.size_bytes = size_bytes
        self.page_size_bytes = page_size_bytes
        self.migrate = migrate
        self.mapped = mapped
        self._base_bytes = 0

    def with_bar(self, bar_bytes: int) -> Self:
        """See `Bar`. Raises: ConfigError: mapped memory too, whose BAR is as large as its file."""
        if self.mapped and bar_bytes != self.bar_bytes:
            raise ConfigError("the BAR of memory that can be mapped has the size of its file")
        return super().with_bar(bar_bytes)

    def _make(self, device: Owner) -> None:
        asked = [name for name in ("region_read", "region_write") if device.overrides(name)]
        if asked and self.mapped and self.index != NO_BAR:
            raise ConfigError(f"{self.name}: a mapped region is not asked for in {' or '.join(asked)}")
        self.memory = DeviceMemory(self.name, self.size_bytes, self.page_size_bytes, mapped=self.mapped)
        self._device = device
        self._raw, self._mark = self.memory.raw, self.memory.pages.mark
        self.window = np.array([self._base_bytes], dtype=np.uint64)

    # --- for the device -------------------------------------------------------------------------------------

    @property
    def base_bytes(self) -> int:
        """Where in the memory the BAR begins; at the end of the memory or behind it, nothing is there.

        Setting it raises OutsideRegionError: an IndexError; it is no 64-bit number.
        """
        return self._base_bytes

    @base_bytes.setter
    def base_bytes(self, base: int) -> None:
        if not 0 <= base < 1 << 64:
            raise OutsideRegionError(self, base, 0)
        self._base_bytes = base
        if self.made:
            self.window[0] = base

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The bytes, shape (size_bytes,): the memory itself. After a write there, call `mark`."""
        return self.memory.data

    def mark(self, offset: int, count: int) -> None:
        """Mark the pages of `count` bytes at `offset` as dirty, after a write through `data`."""
        self._require(offset, count)
        self.memory.pages.mark(offset, count)

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset` and mark its pages dirty.

        Raises: OutsideRegionError: an IndexError; it does not fit, and nothing was written.
        """
        self._require(offset, len(data))
        self.memory.store(offset, data)

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset`, fewer at the end.

        Raises: OutsideRegionError: an IndexError; `offset` or `count` is negative.
        """
        if offset < 0 or count < 0:
            raise OutsideRegionError(self, offset, count)
        return bytes(self.memory.raw[offset : offset + count])

    def _require(self, offset: int, count: int) -> None:
        if not 0 <= offset <= self.size_bytes or not 0 <= count <= self.size_bytes - offset:
            raise OutsideRegionError(self, offset, count)

    # --- for the guest --------------------------------------------------------------------------------------

    def accesses(self) -> tuple[Handler, Handler]:
        """See `Bar`: the memory, or `region_read` and `region_write` where the device has its own."""
        device = self._device
        return (
            self._ask_read if device.overrides("region_read") else self._read,
            self._ask_write if device.overrides("region_write") else self._write,
        )

    @property
    def is_plain(self) -> bool:
        """Whether a guest's access does nothing but read or write the memory, and mark what was written.

        A class of an author's own may do more, whatever it is.
        """
        own = ("region_read", "region_write", "region_handler")
        return type(self) is Region and not any(map(self._device.overrides, own))

    def _read(self, offset: int, out: memoryview) -> None:
        count = len(out)
        offset += self._base_bytes
        if offset + count <= self.size_bytes:
            out[:] = self._raw[offset : offset + count]
            return
        inside = max(0, self.size_bytes - offset)
        out[:inside] = self._raw[offset : offset + inside]
        out[inside:] = b"\xff" * (count - inside)

    def _write(self, offset: int, data: memoryview) -> None:
        count = len(data)
        offset += self._base_bytes
        if offset + count > self.size_bytes:
            count = max(0, self.size_bytes - offset)
            data = data[:count]
        if count:
            self._raw[offset : offset + count] = data
            self._mark(offset, count)

    def _ask_read(self, offset: int, out: memoryview) -> None:
        offset += self._base_bytes
        inside = max(0, min(len(out), self.size_bytes - offset))
        out[inside:] = b"\xff" * (len(out) - inside)
        if inside:
            self._device.region_read(self, offset, out[:inside])

    def _ask_write(self, offset: int, data: memoryview) -> None:
        offset += self._base_bytes
        inside = max(0, min(len(data), self.size_bytes - offset))
        if inside:
            self._device.region_write(self, offset, data[:inside])
