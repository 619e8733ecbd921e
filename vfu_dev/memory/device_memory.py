"""The bytes of one device memory, seen as numpy arrays: of a memfd if clients map it, else anonymous."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import ConfigError
from vfu_dev.memory.kernels import address, zero_pages
from vfu_dev.memory.pages import CODE_DATA, CODE_DIRTY, CODE_NEVER, CODE_ZERO, PageIndices, PageMap

MIN_PAGE_SIZE_BYTES = 64  # small pages make small tests; a device uses 4 KiB and more
MAX_PAGE_SIZE_BYTES = 16 << 20
MAX_PAGES = 1 << 32  # page indices travel as 32 bits

# Pages classified between two reads of the clock.
_CLASSIFY_BATCH_PAGES = 16384
# How long to search for backing store that can be used again; each piece of it takes 3 us to find.
_REFILL_SEARCH_SECONDS = 0.05

# <asm-generic/mman.h>; Python's own name for it is newer than 3.11.
_MAP_NORESERVE = 0x4000

# <linux/fs.h> of Linux 6.7: PAGEMAP_SCAN, struct pm_scan_arg, struct page_region, and the PAGE_IS_* bits.
_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_ARG = struct.Struct("=12Q")
_PM_WALK_END = 4  # which field says where a scan has ended
_PAGE_IS_PRESENT, _PAGE_IS_SWAPPED, _PAGE_IS_PFNZERO = 1 << 3, 1 << 4, 1 << 5
_SCAN_REGIONS = 1024
_SCAN_BYTES = 1 << 30  # in one call, which takes 3 ms if all of it is held: a guest may wait for it
# proc(5), /proc/pid/pagemap: 64 bits for each page, of which these say that it is present, or swapped out.
_PAGEMAP = "/proc/self/pagemap"
_PAGEMAP_ENTRY_BYTES = 8
_PAGEMAP_HELD = np.uint64(1 << 63 | 1 << 62)


@dataclass
class ScanCounters:
    """Scans of a memory's page codes: their number, the pages they found written, and the time they took."""

    count: int = 0
    pages: int = 0
    ns: int = 0
    longest_ns: int = 0  # while the device ran


class DeviceMemory:
    """Memory of a device: zero at first, with a map of its pages.

    One that clients map is a memfd. Any other is anonymous: the kernel provides a page of that in half the
    time (docs/bench-budget.md).

    Args:
        name: the name under which it migrates.
        size_bytes: a multiple of the page size.
        page_size_bytes: unit of dirty tracking and of the state stream; a power of two.
        mapped: clients may map the memory: writes do not call `pages.mark`, and the map is only
            correct after a scan (`Fingerprints`).

    Attributes:
        backing_bytes: size of the backing store; of a mapped memory a power of two, as its BAR.
        raw: the bytes, for single accesses. After a store through it, call `pages.mark`.
        data: the same as an array, shape (size_bytes,) uint8.
        rows: the same as pages, shape (page_count, page_size_bytes) uint8.
        words: the same as pages of 64-bit words, shape (page_count, page_size_bytes / 8).
        pages: what is known about each page.
        scans: cost of the scans so far.
        fd: the memfd of a mapped memory, owned by this object; -1 if there is none.

    Raises: ConfigError: an impossible size.
    """

    def __init__(
        self, name: str, size_bytes: int, page_size_bytes: int = 4096, *, mapped: bool = False
    ) -> None:
        if page_size_bytes & (page_size_bytes - 1) or not (
            MIN_PAGE_SIZE_BYTES <= page_size_bytes <= MAX_PAGE_SIZE_BYTES
        ):
            raise ConfigError(
                f"memory {name}: page size {page_size_bytes} is not a power of two from "
                f"{MIN_PAGE_SIZE_BYTES} to {MAX_PAGE_SIZE_BYTES}"
            )
        if size_bytes <= 0 or size_bytes % page_size_bytes:
            raise ConfigError(
                f"memory {name}: {size_bytes} bytes are not one or more pages of {page_size_bytes}"
            )
        if mapped and size_bytes % mmap.PAGESIZE:
            raise ConfigError(
                f"memory {name}: {size_bytes} bytes cannot be mapped, pages have {mmap.PAGESIZE}"
            )
        self.name = name
        self.mapped = mapped
        self.size_bytes = size_bytes
        # A client that maps a BAR wants a file as large as the BAR; the part behind the memory is unused.
        self.backing_bytes = max(mmap.PAGESIZE, 1 << (size_bytes - 1).bit_length()) if mapped else size_bytes
        self.page_size_bytes = page_size_bytes
        self.page_count = size_bytes // page_size_bytes
        if self.page_count >= MAX_PAGES:
            raise ConfigError(f"memory {name}: {self.page_count} pages, the limit is {MAX_PAGES - 1}")
        self.fd, self._closed = -1, False
        try:
            self._map = self._map_file() if mapped else self._map_anonymous()
        except (OSError, ValueError, OverflowError) as err:
            if self.fd >= 0:
                os.close(self.fd)
            raise ConfigError(f"memory {name}: cannot provide {size_bytes} bytes: {err}") from err
        # A memory that nobody closed, after a failed start or in a test, gives its descriptor back as well.
        self._close_fd = weakref.finalize(self, os.close, self.fd) if mapped else None
        self.raw = memoryview(self._map)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.rows = self.data.reshape(self.page_count, page_size_bytes)
        self.words: npt.NDArray[np.uint64] = self.data.view(np.uint64).reshape(self.page_count, -1)
        self.pages = PageMap(self.page_count, page_size_bytes)
        self.scans = ScanCounters()

    def _map_file(self) -> mmap.mmap:
        self.fd = os.memfd_create(f"vfu-dev:{self.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.backing_bytes)
        # A client that has the file must not be able to truncate it: the server's next access would be a
        # SIGBUS.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mmap.mmap(self.fd, self.size_bytes)

    def _map_anonymous(self) -> mmap.mmap:
        found = mmap.mmap(-1, self.size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        # A process that is forked would keep what is written from then on twice.
        found.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            # Where they are the default, one written byte would cost 2 MiB.
            found.madvise(mmap.MADV_NOHUGEPAGE)
        return found

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset` and mark its pages; the caller has checked the bounds."""
        length = len(data)
        if length:
            self.raw[offset : offset + length] = data
            self.pages.mark(offset, length)

    def classify(self, budget_seconds: float = float("inf"), pages: PageIndices | None = None) -> bool:
        """Scan every dirty page that was not scanned since it was written: data, or all zeros?

        Args:
            budget_seconds: after this time the remaining pages count as data, which is always correct (a page
                of zeros may be sent as data).
            pages: scan only these.

        Returns: whether the budget was enough.
        """
        unknown = self.pages.unclassified() if pages is None else pages
        self.pages.found_written(unknown)
        self.scans.pages += len(unknown)
        codes = self.pages.codes
        deadline = time.monotonic() + budget_seconds
        for start in range(0, len(unknown), _CLASSIFY_BATCH_PAGES):
            if time.monotonic() > deadline:
                codes[unknown[start:]] = CODE_DATA
                return False
            batch = unknown[start : start + _CLASSIFY_BATCH_PAGES]
            codes[batch] = np.where(zero_pages(self.rows, batch), CODE_ZERO, CODE_DATA)
        return True

    def recheck_zeros(self, budget_seconds: float = float("inf")) -> PageIndices:
        """Scan again the pages that were all zeros, were not sent yet, and may have been written unmarked.

        Returns: those there was no time for; the codes of all others are up to date.
        """
        zeros = self.pages.with_code(CODE_ZERO)
        deadline = time.monotonic() + budget_seconds
        for start in range(0, len(zeros), _CLASSIFY_BATCH_PAGES):
            if time.monotonic() > deadline:
                return zeros[start:]
            batch = zeros[start : start + _CLASSIFY_BATCH_PAGES]
            self.pages.codes[batch[~zero_pages(self.rows, batch)]] = CODE_DATA
        return zeros[:0]

    def clear(self) -> None:
        """Make every byte zero and every page unwritten, by giving the backing store back to the kernel."""
        self._give_back(0, self.size_bytes)
        self.pages.forget()

    def _give_back(self, start: int, length: int) -> None:
        """Give backing store back to the kernel."""
        self._map.madvise(mmap.MADV_REMOVE if self.mapped else mmap.MADV_DONTNEED, start, length)

    def begin_refill(self) -> npt.NDArray[np.bool_]:
        """Make every page unwritten, because a whole state is about to be stored.

        Backing store that is there stays: to give it back only to fault it in again took most of the time of
        an incoming migration. So a page's old content stays too, until it is stored to or cleared.

        Returns: which pages have old content, shape (page_count,).
        """
        old = np.zeros(self.page_count, dtype=np.bool_)
        if self.mapped and self.allocated_blocks() * 512 >= self.backing_bytes:
            old[:] = True
            self.pages.forget()
            return old
        deadline = time.monotonic() + _REFILL_SEARCH_SECONDS
        for pages in self.allocated_pages():
            old[pages] = True
            if time.monotonic() > deadline:  # in pieces too small, or a memory too large, to be worth it
                self.clear()
                old = np.zeros(self.page_count, dtype=np.bool_)  # to write zeros would allocate all of it
                break
        self.pages.forget()
        return old

    def clear_pages(self, indices: PageIndices) -> None:
        """Make the pages `indices`, ascending, zero and unwritten; their backing store is given back."""
        if not len(indices):
            return
        self.pages.codes[indices] = CODE_NEVER
        if self.page_size_bytes % mmap.PAGESIZE:
            self.rows[indices] = 0
            return
        starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
        ends = np.append(starts[1:], len(indices))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            first = int(indices[start]) * self.page_size_bytes
            self._give_back(first, (end - start) * self.page_size_bytes)

    def allocated_pages(self) -> Iterator[PageIndices]:
        """Yield the pages that have backing store, ascending, in batches; all others read as zeros.

        This asks the kernel, not the page map, so it also finds what was written behind the map's back. Where
        it cannot be asked about anonymous memory, as in a container without /proc, these are all pages.
        """
        done = 0  # a page larger than the kernel's may lie in more than one extent
        for first, end in self._file_extents() if self.mapped else self._held_extents():
            for batch in range(max(first, done), end, _CLASSIFY_BATCH_PAGES):
                yield np.arange(batch, min(batch + _CLASSIFY_BATCH_PAGES, end), dtype=np.intp)
            done = max(done, end)

    def _file_extents(self) -> Iterator[tuple[int, int]]:
        """Yield where pages with backing store begin and end, of a memfd."""
        position = 0
        while position < self.size_bytes:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: no data at or after `position`
                return
            position = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield self._pages_of(start, position)

    def _held_extents(self) -> Iterator[tuple[int, int]]:
        """Yield the same of anonymous memory."""
        base = address(self.data)
        end = base + -(-self.size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        for search in (_scanned, _looked_up):
            with contextlib.suppress(OSError), open(_PAGEMAP, "rb", buffering=0) as pagemap:
                for start, stop in search(pagemap, base, end):
                    yield self._pages_of(start - base, stop - base)
                return
        yield 0, self.page_count

    def _pages_of(self, start: int, end: int) -> tuple[int, int]:
        """Return the pages, first and behind the last, that the bytes from `start` to `end` lie in."""
        size = self.page_size_bytes
        return start // size, min(-(-end // size), self.page_count)

    def allocated_blocks(self) -> int:
        """Return the backing store of a mapped memory in use, in blocks of 512 bytes; a first write adds."""
        return os.fstat(self.fd).st_blocks

    def mark_allocated(self, position: int = 0, budget_seconds: float = float("inf")) -> int | None:
        """Mark every page that was never written but has backing store: a client wrote or read it.

        The kernel is asked extent by extent, which takes 3 us each: a memory in which every second page was
        touched needs half a second a GiB.

        Args: position: where to begin, in bytes.
        Returns: where to go on, None when everything was scanned.
        """
        codes, marks = self.pages.codes, self.pages.marks
        fd, size, page = self.fd, self.size_bytes, self.page_size_bytes
        deadline = time.monotonic() + budget_seconds
        while position < size:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: no data at or after `position`
                return None
            if start >= size:
                return None
            position = os.lseek(fd, start, os.SEEK_HOLE)
            first, last = start // page, min(-(-position // page), self.page_count)
            if last - first == 1:
                if not marks[first]:
                    marks[first] = CODE_DIRTY
            else:
                piece = codes[first:last]
                piece[piece == CODE_NEVER] = CODE_DIRTY
            if time.monotonic() > deadline:
                return position
        return None

    def relearn(self, budget_seconds: float = float("inf")) -> int | None:
        """Reset the map of a mapped memory: pages with backing store count as written, all others as not.

        Returns: see `mark_allocated`.
        """
        self.pages.forget()
        return self.mark_allocated(0, budget_seconds)

    @property
    def written_bytes(self) -> int:
        """Bytes in pages that were ever written; of a mapped memory, in pages that have backing store."""
        if self.mapped:
            return min(self.size_bytes, self.allocated_blocks() * 512)
        return self.pages.written_pages * self.page_size_bytes

    def close(self) -> None:
        """Give the memory back. The object, and every view somebody kept of it, is dead."""
        if self._closed:
            return
        self._closed = True
        if self._close_fd is not None:
            self._close_fd()
        self.fd = -1
        with contextlib.suppress(BufferError):  # somebody kept a view: the mapping lives as long as that
            self.raw.release()
        # numpy arrays over the mapping keep it alive; it goes when the last of them does.
        del self.data, self.rows, self.words


def _scanned(pagemap: FileIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the addresses between which pages are held, as PAGEMAP_SCAN finds them.

    Raises: OSError: the kernel is older than Linux 6.7, or does not tell.
    """
    regions = np.zeros((_SCAN_REGIONS, 3), dtype=np.uint64)  # start, end, categories
    held, zero = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, _PAGE_IS_PFNZERO
    where = (address(regions), _SCAN_REGIONS)
    while start < end:
        stop = min(end, start + _SCAN_BYTES)
        scan = bytearray(
            _PM_SCAN_ARG.pack(_PM_SCAN_ARG.size, 0, start, stop, 0, *where, 0, zero, zero, held, held)
        )
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, scan)
        for first, last, _ in regions[:count].tolist():
            yield first, last
        start = _PM_SCAN_ARG.unpack(scan)[_PM_WALK_END]


def _looked_up(pagemap: FileIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the same page by page, a second for each TiB; pages that were only read are among them.

    Raises: OSError: the kernel does not tell.
    """
    step = _CLASSIFY_BATCH_PAGES * mmap.PAGESIZE
    for place in range(start, end, step):
        pagemap.seek(place // mmap.PAGESIZE * _PAGEMAP_ENTRY_BYTES)
        wanted = min(step, end - place) // mmap.PAGESIZE * _PAGEMAP_ENTRY_BYTES
        found = pagemap.read(wanted)
        if len(found) != wanted:
            raise OSError(f"{_PAGEMAP} ends early")
        held = (np.frombuffer(found, dtype=np.uint64) & _PAGEMAP_HELD) != 0
        for first, last in np.flatnonzero(np.diff(held, prepend=False, append=False)).reshape(-1, 2).tolist():
            yield place + first * mmap.PAGESIZE, place + last * mmap.PAGESIZE
