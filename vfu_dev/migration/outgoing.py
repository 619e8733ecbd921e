"""What of a stream is made and not read yet: small parts, and the record of pages that is being sent.

Nothing is copied that can be sent from where it lies. Of a trapped memory that is device memory itself: a
page is hashed in the moment in which it is handed out, and what was not handed out yet may still change. Of a
mapped memory it is a copy in the reply's buffer, which the guest cannot reach.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from vfu_dev.memory.kernels import Pages, Vectors, bytes_vector, page_vectors
from vfu_dev.memory.pages import PageIndices
from vfu_dev.migration.plan import PassPlan
from vfu_dev.migration.stream import INDEX_BYTES, RecordType, StreamEncoder

# sendmsg(2) handles each vector by itself: for scattered pages smaller than this a copy is cheaper.
_MIN_VECTOR_BYTES = 2048
_NOTHING: Vectors = np.empty((0, 2), dtype=np.uint64)


class PagesRecord:
    """One record of pages, made as it is read.

    Args:
        encoder: of the stream; no other record is begun before this one has ended.
        index: of the memory in the stream.
        plan: of that memory.
        taken: the pages, ascending.

    Attributes:
        head: what comes first.
        body_bytes: the length of all that is between header and checksum.
        page_bytes: the length of a page.
    """

    def __init__(self, encoder: StreamEncoder, index: int, plan: PassPlan, taken: PageIndices) -> None:
        self._encoder = encoder
        self._plan = plan
        self.page_bytes = plan.memory.page_size_bytes
        self.body_bytes = len(taken) * (INDEX_BYTES + self.page_bytes)
        indices = taken.astype("<u4").tobytes()
        self.head = encoder.begin(RecordType.PAGES, index, len(taken), self.body_bytes) + indices
        encoder.cover(indices)
        plan.put(taken)

    @property
    def left(self) -> int:
        """How many pages were not handed out."""
        return len(self._plan.pending)

    def copy_out(self, out: Pages, fd: int) -> int:
        """Copy the next pages as they are now to the rows of `out`, see `PassPlan`; return how many."""
        hashes = self._plan.copy_out(out, fd)
        self._encoder.cover_pages(hashes)
        return len(hashes)

    def hand_out(self, count: int, rows_for: Callable[[int, int], Pages]) -> tuple[Pages, PageIndices]:
        """Hand out the next pages as they are now: rows, and which of them; see `PassPlan`."""
        rows, indices, hashes = self._plan.hand_out(count, rows_for)
        self._encoder.cover_pages(hashes)
        return rows, indices


class Outgoing:
    """The queue of what is to be read next.

    Attributes:
        left_bytes: of the record under way, what was not read yet.
        taken: what this read has so far, in order.
        taken_bytes: how much that is.
    """

    def __init__(self, encoder: StreamEncoder) -> None:
        self._encoder = encoder
        self._parts: deque[memoryview] = deque()
        self._record: PagesRecord | None = None
        self.left_bytes = 0
        self.taken: list[Vectors] = []
        self.taken_bytes = 0
        # What the last read refers to: it has to live until the next one.
        self._alive: list[memoryview] = []
        self._pool = np.empty(0, dtype=np.uint8)
        self._pool_used = 0

    def put(self, data: bytes) -> None:
        """Queue what is small, or a whole record."""
        self._parts.append(memoryview(data))
        self.left_bytes += len(data)

    def put_pages(self, record: PagesRecord, frame_bytes: int) -> None:
        """Queue a record of pages, whose framing has `frame_bytes`; the queue is empty."""
        self._parts.append(memoryview(record.head))
        self._record = record
        self.left_bytes += frame_bytes + record.body_bytes

    def begin_read(self) -> None:
        """Note that what was read before is of no use any more."""
        self.taken, self.taken_bytes = [_NOTHING], 0
        self._alive.clear()
        self._pool_used = 0

    def take(self, room: int) -> int:
        """Take the next bytes, at least one and at most `room`; return how many. There has to be one."""
        vectors, count = self._next(room)
        self.taken.append(vectors)
        self.taken_bytes += count
        return count

    def fill(self, out: memoryview, fd: int = -1) -> int:
        """Copy the next bytes to `out`, at least one; return how many. There has to be one.

        Somebody else may write to `out`: nothing is read back from there.

        Args:    fd: where something to be read ends it early; -1: nowhere.
        """
        if record := self._whole_pages(len(out)):
            size = record.page_bytes
            count = min(record.left, len(out) // size)
            target: Pages = np.frombuffer(out[: count * size], dtype=np.uint8).reshape(count, -1)
            stored = record.copy_out(target, fd) * size
            self.left_bytes -= stored
            return stored
        part = self._part(len(out))
        out[: len(part)] = part
        return len(part)

    def _next(self, room: int) -> tuple[Vectors, int]:
        if record := self._whole_pages(room):
            size = record.page_bytes
            count, split = min(record.left, room // size), 0
            if record.left > count and room > count * size:
                split = 1  # hashed with the others: a part of it comes next, and the rest with the next read
            rows, indices = record.hand_out(count + split, self._pool_rows)
            if split:
                self._parts.append(memoryview(rows[indices[count]].tobytes()))
            self.left_bytes -= count * size
            return self._pages(rows, indices[:count]), count * size
        part = self._part(room)
        self._alive.append(part)
        return bytes_vector(part), len(part)

    def _whole_pages(self, room: int) -> PagesRecord | None:
        """Return the record whose pages come next, if there is `room` for one; None: a part does."""
        record = self._record
        if self._parts or record is None:
            return None
        if record.left and room >= record.page_bytes:
            return record
        if record.left:  # of which a part is read now, and the rest later
            rows, indices = record.hand_out(1, self._pool_rows)
            self._parts.append(memoryview(rows[indices].tobytes()))
        else:
            self._record = None
            self._parts.append(memoryview(self._encoder.end()))
        return None

    def _part(self, room: int) -> memoryview:
        """Take up to `room` bytes off the first part."""
        part = self._parts.popleft()
        if len(part) > room:
            self._parts.appendleft(part[room:])
            part = part[:room]
        self.left_bytes -= len(part)
        return part

    def _pages(self, rows: Pages, indices: PageIndices) -> Vectors:
        vectors = page_vectors(rows, indices)
        count, size = len(indices), rows.shape[1]
        if len(vectors) * _MIN_VECTOR_BYTES <= count * size:
            return vectors
        out = self._pool_rows(count, size)
        np.take(rows, indices, axis=0, out=out, mode="clip")  # "raise" would copy once more
        return page_vectors(out, np.arange(count))

    def _pool_rows(self, count: int, size: int) -> Pages:
        """Return `count` rows of `size` bytes, untouched until the next read."""
        begin, self._pool_used = self._pool_used, self._pool_used + count * size
        if self._pool_used > len(self._pool):
            self._alive.append(self._pool.data)
            self._pool = np.empty(max(self._pool_used, 1 << 20), dtype=np.uint8)  # all of the next such read
            begin, self._pool_used = 0, count * size
        return self._pool[begin : self._pool_used].reshape(count, size)
