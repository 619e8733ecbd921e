"""Finds changes in a mapped memory by comparison with a copy of the content sent last.

The guest's CPU writes a mapped memory without leaving a mark. So a migration keeps a copy of every page as it
was sent, and scans for pages that differ. Each page with content costs its size once more while the migration
lasts; pages of zeros and pages never touched cost nothing.

Measured on the project's machine (2 cores, 512 MiB, other work running), in bytes of the memory scanned:
comparing words 13 GB/s in chunks of 1 MiB, 7 GB/s in chunks of 64 KiB; xor and or-reduce 11; numpy's void
comparison 3; comparing `bytes` 1. A hash for each page (xxh3) would be as fast (15 GB/s) and needs no copy.
It is not used: a guest can choose content that collides, and a page has to be copied before it can be sent
anyway, because it may change while its checksum is taken.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt

from vfu_dev.memory.device_memory import DeviceMemory
from vfu_dev.memory.kernels import Hashes, Pages, changed_pages, keep_pages
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DATA, CODE_DIRTY, CODE_NEVER, PageIndices

# Memory and copy are read once and streamed; the result of the comparison, an eighth of this, is read again
# and stays in the cache.
SCAN_CHUNK_BYTES = 1 << 20
# Below this a second thread costs more than it brings (waking it takes some 50 us).
_PARALLEL_BYTES = 32 << 20
# After this number of scans the slower of one and two threads is tried again: the other core may be free by
# now.
_RETRY_SCANS = 16

_HUGE_BYTES = 2 << 20
# Each is a mapping of its own for the kernel, which allows 65530.
_MAX_HUGE_RUNS = 4096

# <asm-generic/mman.h>; Python's own name for it is newer than 3.11. The copy may never become that large.
_MAP_NORESERVE = 0x4000


class Shadow:
    """The content of `memory` as a migration sent it last: zeros at first, as at the destination.

    Args:    memory: mapped by a client. Its page map says what is clean; changed pages are marked in it.

    Attributes:
        rows: the copies, shape (page_count, page_size_bytes) uint8.
        settled: the device is stopped and every page was scanned since: no further changes exist.
        expected_pages: estimated number of changed pages in the part that the last scan did not reach, if it
            is like the part scanned; 0 when all was scanned.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._map = mmap.mmap(
            -1, memory.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        )
        data: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.rows: Pages = data.reshape(memory.page_count, -1)
        self._advise_huge_pages()
        self._held = np.zeros(memory.page_count, dtype=np.bool_)  # pages of the copy that are not just zeros
        self._chunk_pages = max(1, SCAN_CHUNK_BYTES // memory.page_size_bytes)
        self._chunk_bytes = self._chunk_pages * memory.page_size_bytes  # more, where one page has more
        # Where a search for pages that got backing store goes on, and what was in use when it began.
        self._search_at: int | None = 0
        self._search_blocks = memory.allocated_blocks()
        self._cursor = 0
        self._final: list[int] | None = None  # chunks to scan since the device stopped
        self.settled = False
        self.expected_pages = 0

    def _advise_huge_pages(self) -> None:
        """Have huge pages where all of one will be copied to: that is one fault instead of 512."""
        page = self._memory.page_size_bytes
        skipped = -self.rows.__array_interface__["data"][0] % _HUGE_BYTES
        if page > _HUGE_BYTES or skipped % page:
            return
        pages, first, runs = _HUGE_BYTES // page, skipped // page, _MAX_HUGE_RUNS
        for where, codes in self._memory.pages.stretches():
            before = (first - where.start) % pages
            written = codes[before:] != CODE_NEVER
            whole = written[: len(written) // pages * pages].reshape(-1, pages).all(axis=1)
            edges = np.flatnonzero(np.diff(whole, prepend=False, append=False)).reshape(-1, 2)[:runs]
            runs -= len(edges)
            for start, end in edges.tolist():
                place = (where.start + before) * page + start * _HUGE_BYTES
                with contextlib.suppress(OSError):  # a kernel without them
                    self._map.madvise(mmap.MADV_HUGEPAGE, place, (end - start) * _HUGE_BYTES)

    def keep(self, indices: PageIndices) -> Hashes:
        """Take the pages `indices` over as they are now, to be sent from `rows`; returns their hashes."""
        self._held[indices] = True
        return keep_pages(self._memory.rows, indices, self.rows)

    def keep_zeros(self, indices: PageIndices) -> None:
        """Note that the pages `indices` are sent as zeros; what the guest writes meanwhile will be found."""
        held = indices[self._held[indices]]
        self.rows[held] = 0
        self._held[held] = False

    def stop(self, budget_seconds: float) -> None:
        """Note that there are no writes from now on: one more scan of everything is the last."""
        memory = self._memory
        if memory.mark_allocated(0, budget_seconds / 2) is not None:
            # To be safe, everything that may have been written is sent.
            codes = memory.pages.codes
            codes[codes == CODE_NEVER] = CODE_DIRTY
        # Pages sent as zeros from here on are not scanned again: they have to be zeros.
        memory.pages.codes[memory.recheck_zeros(budget_seconds / 2)] = CODE_DATA
        self._final = self._chunks_with_clean_pages().tolist()
        self.settled = not self._final
        self.expected_pages = 0

    def scan(self, budget_seconds: float) -> int:
        """Find clean pages that changed and mark them, for about `budget_seconds`; returns pages scanned.

        A scan goes on where the previous one ended, so that each part has its turn whatever the budget.
        """
        if self.settled:
            return 0
        memory = self._memory
        if self._final is None:
            self._find_allocated(budget_seconds / 2)
            # For the figures; what is written after it was sent as zeros is found like everything else.
            memory.recheck_zeros(budget_seconds)
            chunks = self._chunks_with_clean_pages()
            chunks = np.roll(chunks, -int(np.searchsorted(chunks, self._cursor)))
        else:
            chunks = np.array(self._final, dtype=np.intp)
        turns = iter(chunks.tolist())
        found, scanned, done = _compare_all(
            self._compare, turns, len(chunks), self._chunk_bytes, budget_seconds
        )
        changed = np.concatenate(found) if found else np.empty(0, dtype=np.intp)
        memory.pages.mark_pages(changed)
        left = chunks[done:]
        unseen = len(left) * self._chunk_pages
        self.expected_pages = -(-len(changed) * unseen // scanned) if scanned else 0
        if self._final is None:
            self._cursor = int(left[0]) if len(left) else 0
        else:
            self._final = left.tolist()
            self.settled = not self._final
        return scanned

    def _find_allocated(self, budget_seconds: float) -> None:
        """Go on searching for pages written for the first time; begin again when there are more."""
        if self._search_at is None:
            blocks = self._memory.allocated_blocks()
            if blocks == self._search_blocks:
                return
            self._search_at, self._search_blocks = 0, blocks
        self._search_at = self._memory.mark_allocated(self._search_at, budget_seconds)

    def _chunks_with_clean_pages(self) -> PageIndices:
        found = [np.empty(0, dtype=np.intp)]
        for where, codes in self._memory.pages.stretches():
            clean = codes >= CODE_CLEAN
            starts = np.arange(0, len(clean), self._chunk_pages)
            found.append(
                np.flatnonzero(np.logical_or.reduceat(clean, starts)) + where.start // self._chunk_pages
            )
        return np.concatenate(found)

    def _compare(self, chunk: int) -> tuple[PageIndices, int]:
        """Return the clean pages of `chunk` that changed, and how many clean pages it has; any thread."""
        memory, start = self._memory, chunk * self._chunk_pages
        return changed_pages(memory.rows, self.rows, memory.pages.codes, start, start + self._chunk_pages)


class _Pace:
    """Scan rates of one and two threads, bytes a second; other work decides which is better."""

    def __init__(self) -> None:
        self.cores = len(os.sched_getaffinity(0))
        self.rates = [0.0, 0.0]
        self.scans = 0

    def threads(self, work_bytes: int) -> int:
        if self.cores < 2 or work_bytes < _PARALLEL_BYTES:
            return 1
        self.scans += 1
        better = 1 if self.rates[1] >= self.rates[0] else 0
        if self.scans % _RETRY_SCANS == 0 or not all(self.rates):
            better = self.rates.index(min(self.rates))
        return better + 1

    def learn(self, threads: int, work_bytes: float, seconds: float) -> None:
        if work_bytes >= _PARALLEL_BYTES and seconds > 0:
            self.rates[threads - 1] = work_bytes / seconds


_pace = _Pace()


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="vfu-scan")


def _compare_all(
    compare: Callable[[int], tuple[PageIndices, int]],
    turns: Iterator[int],
    turn_count: int,
    turn_bytes: int,
    budget_seconds: float,
) -> tuple[list[PageIndices], int, int]:
    """Call `compare` for `turns` until the time is over; numpy lets both threads run while it compares.

    Args:    turns: `turn_count` of them, each of `turn_bytes`.
    Returns: the pages that changed, the number of pages scanned, the number of turns done, the first ones.
    """
    began = time.monotonic()
    deadline = began + budget_seconds
    lock = threading.Lock()
    found: list[PageIndices] = []
    scanned = done = 0

    def work() -> tuple[int, int]:
        pages = count = 0
        while True:
            # A thread finishes the chunk that it has taken: the chunks done are always a prefix.
            with lock:
                turn = next(turns, None) if time.monotonic() < deadline or not count else None
            if turn is None:
                return pages, count
            changed, clean = compare(turn)
            pages += clean
            count += 1
            if len(changed):
                found.append(changed)

    threads = _pace.threads(turn_count * turn_bytes)
    other = _helper().submit(work) if threads == 2 else None
    scanned, done = work()
    if other is not None:
        pages, count = other.result()
        scanned, done = scanned + pages, done + count
    _pace.learn(threads, done * turn_bytes, time.monotonic() - began)
    return found, scanned, done
