"""The bytes of one device memory: a memfd, mapped once, seen as numpy arrays."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import ConfigError
from vfu_dev.memory.pages import CODE_DATA, CODE_ZERO, PageIndices, PageMap
from vfu_dev.memory.scan import zero_pages

MIN_PAGE_SIZE_BYTES = 64  # small pages make small tests; a device uses 4 KiB and more
MAX_PAGE_SIZE_BYTES = 16 << 20
MAX_PAGES = 1 << 32  # page indices travel as 32 bits

# Pages classified between two looks at the clock.
_CLASSIFY_BATCH_PAGES = 16384


@dataclass
class ScanCounters:
    """Looks at all page codes of a memory, the pages found written by them, and the time that took."""

    looks: int = 0
    pages: int = 0
    ns: int = 0


class DeviceMemory:
    """Memory of a device: zero at first, backed by a memfd, with a map of its pages.

    Args:
        name: the name under which it migrates.
        size_bytes: a multiple of the page size.
        page_size_bytes: unit of dirty tracking and of the state stream; a power of two.

    Attributes:
        raw: the bytes, for single accesses. Whoever stores through it calls `pages.mark`.
        data: the same as an array, shape (size_bytes,) uint8.
        rows: the same as pages, shape (page_count, page_size_bytes) uint8.
        words: the same as pages of 64-bit words, shape (page_count, page_size_bytes / 8).
        pages: what is known about each page.
        scans: what looking at them cost so far.
        fd: the memfd, owned by this object.

    Raises:  ConfigError: a size that cannot be.
    """

    def __init__(self, name: str, size_bytes: int, page_size_bytes: int = 4096) -> None:
        if page_size_bytes & (page_size_bytes - 1) or not (
            MIN_PAGE_SIZE_BYTES <= page_size_bytes <= MAX_PAGE_SIZE_BYTES
        ):
            raise ConfigError(
                f"memory {name}: page size {page_size_bytes} is not a power of two from "
                f"{MIN_PAGE_SIZE_BYTES} to {MAX_PAGE_SIZE_BYTES}"
            )
        if size_bytes <= 0 or size_bytes % page_size_bytes:
            raise ConfigError(
                f"memory {name}: size {size_bytes} is not a multiple of the page size {page_size_bytes}"
            )
        self.name = name
        self.size_bytes = size_bytes
        self.page_size_bytes = page_size_bytes
        self.page_count = size_bytes // page_size_bytes
        if self.page_count >= MAX_PAGES:
            raise ConfigError(f"memory {name}: {self.page_count} pages, the limit is {MAX_PAGES - 1}")
        self.fd = os.memfd_create(f"vfu-dev:{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
            self._map = mmap.mmap(self.fd, size_bytes)
        except (OSError, ValueError, OverflowError) as err:
            os.close(self.fd)
            raise ConfigError(f"memory {name}: cannot provide {size_bytes} bytes: {err}") from err
        self.raw = memoryview(self._map)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.rows = self.data.reshape(self.page_count, page_size_bytes)
        self.words: npt.NDArray[np.uint64] = self.data.view(np.uint64).reshape(self.page_count, -1)
        self.pages = PageMap(self.page_count, page_size_bytes)
        self.scans = ScanCounters()

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset` and mark its pages; the caller has checked the bounds."""
        length = len(data)
        if length:
            self.raw[offset : offset + length] = data
            self.pages.mark(offset, length)

    def classify(self, budget_seconds: float = float("inf")) -> bool:
        """Look at every dirty page nobody looked at since it was written: data, or all zeros?

        Args:    budget_seconds: beyond it, pages that are left count as data, which is always right (a page
        of
                 zeros may be sent as data) and never late.
        Returns: whether the budget was enough.
        """
        unknown = self.pages.unclassified()
        self.pages.looked_at(unknown)
        self.scans.pages += len(unknown)
        codes = self.pages.codes
        deadline = time.monotonic() + budget_seconds
        for start in range(0, len(unknown), _CLASSIFY_BATCH_PAGES):
            if time.monotonic() > deadline:
                codes[unknown[start:]] = CODE_DATA
                return False
            batch = unknown[start : start + _CLASSIFY_BATCH_PAGES]
            codes[batch] = np.where(zero_pages(self.words, batch), CODE_ZERO, CODE_DATA)
        return True

    def clear(self) -> None:
        """Make every byte zero and every page unwritten, by giving the backing store back to the kernel."""
        self._map.madvise(mmap.MADV_REMOVE)
        self.pages.forget()

    def allocated_pages(self) -> Iterator[PageIndices]:
        """Yield the pages that have backing store, ascending, in batches; all others read as zeros.

        This asks the kernel, not the page map, so it also finds what was written behind the map's back.
        """
        position = 0
        while position < self.size_bytes:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: no data at or after `position`
                return
            position = os.lseek(self.fd, start, os.SEEK_HOLE)
            first = start // self.page_size_bytes
            last = min(-(-position // self.page_size_bytes), self.page_count)
            for batch in range(first, last, _CLASSIFY_BATCH_PAGES):
                yield np.arange(batch, min(batch + _CLASSIFY_BATCH_PAGES, last), dtype=np.intp)

    @property
    def written_bytes(self) -> int:
        """Bytes in pages that were ever written."""
        return self.pages.written_pages * self.page_size_bytes

    def close(self) -> None:
        """Give the memory back. The object, and every view somebody kept of it, is dead."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        with contextlib.suppress(BufferError):  # somebody kept a view: the mapping lives as long as that
            self.raw.release()
        # numpy arrays over the mapping keep it alive; it goes when the last of them does.
        del self.data, self.rows, self.words
