"""Finds changes in a mapped memory by fingerprints of the content sent last.

The guest's CPU writes a mapped memory without leaving a mark. So a migration keeps a fingerprint of every
page as it was sent, 16 bytes for each 4 KiB, and scans for pages that have another one now.

A guest must not be able to aim at a fingerprint: a change that keeps it would not be sent. So it is NH of
UMAC (CRYPTO '99), 32-bit words and two sums, with a key of random bytes that is the session's own and never
leaves it. Of two contents that differ, even if a guest chose both, the fingerprints are equal with a
probability of at most 2^-64; that is proven. XXH3 is as fast, and worse, with 128 bits too: it adds up to 16
words before it mixes them. A guest that flips the top bits of two of these keeps the hash with one random
secret of 2^33, and with one 64-bit seed of 9300 (43 of 400,000), because the words of the key then differ by
constants that everybody knows.

Measured (2 cores, AVX2, the least of five rounds), in processor time per MiB of 4 KiB pages in no cache: a
scan takes 28 us, and 42 without AVX2; comparing two copies takes 50. To copy a page to where it is sent from,
to hash it and to take its fingerprint is 43 us; to copy it to new huge pages and to hash it, 83.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from vfu_dev.memory.device_memory import DeviceMemory
from vfu_dev.memory.kernels import MAX_BLOCK_BYTES, changed_pages, random_key
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DATA, CODE_DIRTY, CODE_NEVER, PageIndices

# A scan reads the clock once for each chunk of this size: every 30 us.
SCAN_CHUNK_BYTES = 1 << 20
# Below this a second thread costs more than it brings (waking it takes some 50 us).
_PARALLEL_BYTES = 32 << 20
# After this number of scans the slower of one and two threads is tried again: the other core may be free by
# now.
_RETRY_SCANS = 16


class Fingerprints:
    """The content of `memory` as a migration sent it last: zeros at first, as at the destination.

    Args: memory: mapped by a client. Its page map says what is clean; changed pages are marked in it.

    Attributes:
        key: random, of this session.
        sent: the fingerprints, shape (page_count, 2 for each block of a page) uint64.
        settled: the device is stopped and every page was scanned since: no further changes exist.
        expected_pages: estimated number of changed pages in the part that the last scan did not reach, if it
            is like the part scanned; 0 when all was scanned.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        size = memory.page_size_bytes
        self.key = random_key(size)
        self.sent = np.zeros((memory.page_count, 2 * max(1, size // MAX_BLOCK_BYTES)), dtype=np.uint64)
        self._chunk_pages = max(1, SCAN_CHUNK_BYTES // size)
        self._chunk_bytes = self._chunk_pages * size  # more, where one page has more
        # Where a search for pages that got backing store goes on, and what was in use when it began.
        self._search_at: int | None = 0
        self._search_blocks = memory.allocated_blocks()
        self._cursor = 0
        self._final: list[int] | None = None  # chunks to scan since the device stopped
        self.settled = False
        self.expected_pages = 0

    def sent_zeros(self, indices: PageIndices) -> None:
        """Note that the pages `indices` are sent as zeros; what the guest writes meanwhile will be found."""
        self.sent[indices] = 0

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
        end = start + self._chunk_pages
        return changed_pages(memory.rows, self.key, self.sent, memory.pages.codes, start, end)


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
    """Call `compare` for `turns` until the time is over; ctypes lets both threads run meanwhile.

    Args: turns: `turn_count` of them, each of `turn_bytes`.
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
