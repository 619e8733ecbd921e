"""Passes through one memory: which pages are sent, in which order, and how many bytes that leaves.

A pass is the set of pages that were dirty when it began, ordered by the number of times each was sent, so
that pages rewritten all the time come last. A page that was sent more often than is usual in the pass, and is
written again while it waits, leaves the pass and waits for the next one: it is hot, others are colder, and
sending it now would be wasted. (If every page written again left, a sequential writer would be overtaken
forever by a reader that sends the pages written next; docs/state-stream.md has the figures.) Each pass sends
a page at most once, and nothing starves: the coldest pages of a pass cannot leave it.

Writes to a memory that a client has mapped leave no mark. Before the page codes of such a memory are read, a
scan of limited time looks for changed pages (`Fingerprints`); if the time did not suffice, the number of
changed pages in the rest is estimated and counts as dirty.

The bytes left are computed from the same page codes that decide what is sent. Pages of the current pass and
pages that wait for the next one go into separate records, and are counted that way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from vfu_dev.memory import DeviceMemory, Fingerprints
from vfu_dev.memory.pages import CODE_DATA, CODE_DIRTY, CODE_ZERO, PageIndices, is_dirty
from vfu_dev.memory.sending import SENT_CODE, Record
from vfu_dev.migration.schema import MigratableState
from vfu_dev.migration.stream import (
    INITIAL_END_BYTES,
    ZERO_PAGES_A_RECORD,
    pages_a_record,
    pages_bytes,
    prelude_bytes,
    tail_bytes,
    zeros_bytes,
)

# A query or the start of a pass scans new content for at most this time; the remaining pages count as data,
# and are sent as data. QEMU gives up on a reply after 5 s (x-msg-timeout); 10 GB of zeros take one second.
CLASSIFY_BUDGET_SECONDS = 1.5

# Time limits of a scan of all mapped memories while the device runs: no MMIO is served meanwhile. A size
# query gets more time than the start of a pass, because its answer decides when the device is stopped; a pass
# starts whenever the reader has caught up. At 30 GB/s they cover 1.5 GB and 300 MB.
FIGURES_SCAN_SECONDS = 0.05
PASS_SCAN_SECONDS = 0.01
# The same in STOP_COPY; above 45 GB the scan goes on while the client reads the pages found so far.
FINAL_SCAN_SECONDS = 1.5

_WINDOW_PAGES = 4096
_NO_PAGES: PageIndices = np.empty(0, dtype=np.intp)


class PassPlan:
    """The passes of one session through one memory.

    Args:
        memory: its page map is read, and pages are claimed in it as they are taken.
        cold_first: the policy above; False sends each pass in index order.
        share: share of the scan time; other memories have the rest.

    Attributes:
        initial: pages that count as initial and were not sent yet, shape (page_count,) bool.
        sends: number of times each page was sent, saturating, shape (page_count,) uint8.
        hashes: of each page as last sent (`vfu_dev.memory.kernels`), shape (page_count,) uint64.
        record: of pages, one after the other. What is written to a page before it is handed out needs no
            other record.
    """

    def __init__(self, memory: DeviceMemory, cold_first: bool = True, share: float = 1.0) -> None:
        self.memory = memory
        self._share = share
        self._stopped = False
        self._fingerprints: Fingerprints | None = None
        if memory.mapped:
            memory.relearn(CLASSIFY_BUDGET_SECONDS * share)
            self._fingerprints = Fingerprints(memory)
        else:
            memory.pages.rearm()
        self._cold_first = cold_first
        self._usual_sends = math.inf
        count = memory.page_count
        self.initial = np.zeros(count, dtype=np.bool_)
        self.sends = np.zeros(count, dtype=np.uint8)
        self.hashes = np.zeros(count, dtype=np.uint64)
        self.record = Record(memory.rows, memory.pages.codes, self.hashes, self._fingerprints)
        self._in_pass = np.zeros(count, dtype=np.bool_)
        self._data = self._zeros = _NO_PAGES
        self._data_at = self._zeros_at = 0

    def choose_initial(self, limit_bytes: int | None) -> int:
        """Count dirty pages as initial, lowest first, up to `limit_bytes`; returns the bytes chosen."""
        dirty = self.memory.pages.collect()
        if limit_bytes is not None:
            dirty = dirty[: -(-limit_bytes // self.memory.page_size_bytes)]
        self.initial[dirty] = True
        return len(dirty) * self.memory.page_size_bytes

    def stop(self) -> None:
        """Note that there are no more writes from now on."""
        self._stopped = True
        if self._fingerprints is not None:
            with self._timed():
                self._fingerprints.stop(FINAL_SCAN_SECONDS * self._share)
                self._scan(FINAL_SCAN_SECONDS)

    @property
    def settled(self) -> bool:
        """Whether the set of dirty pages is final, once the device is stopped."""
        return self._fingerprints is None or self._fingerprints.settled

    def make_dirty(self, count_bytes: int) -> None:
        """Send the first bytes of the memory once more, whether they changed or not."""
        self.memory.pages.codes[: -(-count_bytes // self.memory.page_size_bytes)] = CODE_DIRTY

    def add_initial(self, indices: PageIndices) -> None:
        """Have the pages `indices` sent again, as initial, and before all others."""
        self.memory.pages.mark_pages(indices)
        self.initial[indices] = True
        self.record.send_again(indices)

    def drop_pass(self) -> None:
        """Give up the current pass; its remaining pages wait for the next one."""
        self._in_pass[self._data] = self._in_pass[self._zeros] = False
        self._data = self._zeros = _NO_PAGES

    def _claim_pending(self) -> None:
        """Note that what was written to pages of the record under way goes with it."""
        if len(pages := self.record.pending):
            if len(self.record.again):
                pages = np.setdiff1d(pages, self.record.again)
            self.memory.pages.codes[pages] = SENT_CODE

    def sent_zeros(self, indices: PageIndices) -> None:
        """Note that the pages `indices` are sent as zeros."""
        self.hashes[indices] = 0
        if self._fingerprints is not None:
            self._fingerprints.sent_zeros(indices)

    def start_pass(self, initial_only: bool, scan_seconds: float = PASS_SCAN_SECONDS) -> bool:
        """Plan a pass over what is dirty now; False when that is nothing."""
        with self._timed():
            self._scan(scan_seconds)
            return self._start_pass(initial_only)

    def _start_pass(self, initial_only: bool) -> bool:
        # Masks all the way: an index for each page takes five times as long, in which the guest waits.
        zeros, data, sends = [_NO_PAGES], [_NO_PAGES], [self.sends[:0]]
        for where, codes in self.memory.pages.stretches():
            chosen = is_dirty(codes)
            if initial_only:
                chosen &= self.initial[where]
            self._in_pass[where] = chosen
            is_zero = codes == CODE_ZERO
            zeros.append(np.flatnonzero(chosen & is_zero) + where.start)
            data.append(np.flatnonzero(chosen & ~is_zero) + where.start)
            if self._cold_first:
                sends.append(self.sends[where][chosen])
        self._zeros, self._data = np.concatenate(zeros), np.concatenate(data)
        self._zeros_at = self._data_at = 0
        count = len(self._zeros) + len(self._data)
        if self._cold_first and count:
            each = np.concatenate(sends)
            self._usual_sends = int(each.sum()) / count
            if each.min() != each.max():
                self._zeros, self._data = self._coldest_first(self._zeros), self._coldest_first(self._data)
        return count > 0

    def _coldest_first(self, pages: PageIndices) -> PageIndices:
        return pages[np.argsort(self.sends[pages], kind="stable")]

    def take_zeros(self) -> PageIndices:
        """Claim the pages of the next record of zero pages, ascending; empty when the pass has no more."""
        taken, self._zeros_at = self._take(self._zeros, self._zeros_at, ZERO_PAGES_A_RECORD, CODE_ZERO)
        return taken

    def take_data(self) -> PageIndices:
        """Claim the pages of the next record of pages, ascending; empty when the pass has no more."""
        limit = pages_a_record(self.memory.page_size_bytes)
        taken, self._data_at = self._take(self._data, self._data_at, limit, CODE_DATA)
        return taken

    def _take(self, queue: PageIndices, at: int, limit: int, code: int) -> tuple[PageIndices, int]:
        """Take the next `limit` pages of `queue` that have `code` and are still in the pass."""
        parts: list[PageIndices] = []
        missing = limit
        codes = self.memory.pages.codes
        while missing and at < len(queue):
            # Most of the time all of the first ones do.
            window = queue[at : at + (max(limit, _WINDOW_PAGES) if parts else limit)]
            written = window[codes[window] == CODE_DIRTY]
            if len(written):
                # These are sent as they are now; what is hot waits for the next pass.
                self.memory.classify(CLASSIFY_BUDGET_SECONDS * self._share, written[~self._is_hot(written)])
            fit = np.flatnonzero((codes[window] == code) & self._in_pass[window])[:missing]
            at += int(fit[-1]) + 1 if len(fit) == missing else len(window)
            missing -= len(fit)
            parts.append(window[fit])
        if missing == limit:
            return _NO_PAGES, at
        taken = np.sort(parts[0] if len(parts) == 1 else np.concatenate(parts))
        self.memory.pages.claim(taken)
        self._in_pass[taken] = False
        self.initial[taken] = False
        return taken, at

    def _scan(self, budget_seconds: float) -> None:
        """Bring all page codes up to date; `budget_seconds` is for what others write to a mapped memory."""
        if self._fingerprints is not None:
            self.memory.scans.pages += self._fingerprints.scan(budget_seconds * self._share)
        self._claim_pending()
        self._classify()

    def _classify(self) -> None:
        """Tell data from zeros; hot pages written since they were planned leave the pass."""
        written = self.memory.pages.unclassified()
        self._in_pass[written[self._is_hot(written)]] = False
        self.memory.classify(CLASSIFY_BUDGET_SECONDS * self._share)

    def _is_hot(self, pages: PageIndices) -> npt.NDArray[np.bool_]:
        """Return for each of `pages` whether it was sent more often than is usual in this pass."""
        return self.sends[pages] > self._usual_sends

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count a scan of all pages, and its time."""
        began = time.perf_counter_ns()
        yield
        took = time.perf_counter_ns() - began
        scans = self.memory.scans
        scans.count += 1
        scans.ns += took
        if not self._stopped:
            scans.longest_ns = max(scans.longest_ns, took)

    def remaining(self) -> tuple[int, int]:
        """Return the (initial, dirty) stream bytes still to be read from this memory."""
        with self._timed():
            self._scan(FIGURES_SCAN_SECONDS)
            return self._remaining()

    def _remaining(self) -> tuple[int, int]:
        size, pages = self.memory.page_size_bytes, self.memory.pages
        initial = dirty = 0
        for code, queue in (
            (CODE_DATA, self._data[self._data_at :]),
            (CODE_ZERO, self._zeros[self._zeros_at :]),
        ):
            queue = queue[(pages.codes[queue] == code) & self._in_pass[queue]]
            now_initial = int(np.count_nonzero(self.initial[queue]))
            now_dirty = len(queue) - now_initial
            later_initial, later_dirty = -now_initial, -now_dirty
            for where, codes in pages.stretches():
                has_code = codes == code
                as_initial = int(np.count_nonzero(has_code & self.initial[where]))
                later_initial += as_initial
                later_dirty += int(np.count_nonzero(has_code)) - as_initial
            if code == CODE_DATA:
                if self._fingerprints is not None:
                    later_dirty += self._fingerprints.expected_pages
                initial += pages_bytes(now_initial, size) + pages_bytes(later_initial, size)
                dirty += pages_bytes(now_dirty, size) + pages_bytes(later_dirty, size)
            else:
                initial += zeros_bytes(now_initial) + zeros_bytes(later_initial)
                dirty += zeros_bytes(now_dirty) + zeros_bytes(later_dirty)
        return initial, dirty


def whole_state_bytes(contents: MigratableState) -> int:
    """Return the stream bytes of a save that would begin now; scans pages written since the last scan."""
    total = prelude_bytes(contents) + INITIAL_END_BYTES + tail_bytes(contents)
    budget_seconds = CLASSIFY_BUDGET_SECONDS / max(1, len(contents.memories))
    for memory in contents.memories:
        if memory.mapped:
            memory.relearn(budget_seconds)
        memory.classify(budget_seconds)
        data = zeros = 0
        for _, codes in memory.pages.stretches():
            content = codes & 3  # with or without CODE_CLEAN of a session that is over
            data += int(np.count_nonzero(content == CODE_DATA))
            zeros += int(np.count_nonzero(content == CODE_ZERO))
        total += pages_bytes(data, memory.page_size_bytes) + zeros_bytes(zeros)
    return total
