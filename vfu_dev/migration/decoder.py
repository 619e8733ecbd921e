"""Checks a state stream of any released version, and hands its contents to a sink."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from vfu_dev.errors import StreamError
from vfu_dev.memory.kernels import Hashes, hash_bytes
from vfu_dev.memory.pages import PageIndices
from vfu_dev.memory.sending import CHECKSUM_BYTES, INDEX_BYTES
from vfu_dev.migration.compat import Incoming, judge_schema
from vfu_dev.migration.schema import MAX_SCHEMA_BYTES, MigratableState
from vfu_dev.migration.stream import (
    DIGEST_BYTES,
    MAGIC,
    PRELUDE,
    READ_VERSIONS,
    RECORD,
    STREAM_VERSION,
    ZERO_PAGES_A_RECORD,
    RecordType,
    pages_a_record,
)

# Version 1: the checksum ends the header, and covers the body as it is.
_RECORD_V1 = struct.Struct("<HHIIIQQ")
PAGES_BODY_BYTES_V1 = 256 * 1024


class ArrivingPages(Protocol):
    """Stores pages of one memory, in the order of their indices."""

    @property
    def left(self) -> int:
        """How many are still to come."""

    @property
    def hashes(self) -> Hashes:
        """The hashes of what was stored so far, shape (n,).

        Only when all of a record was taken is it known whether they are the right ones; until then that
        memory must not be relied on.
        """

    def store(self, data: memoryview) -> None:
        """Store the next pages, one or more of those left: `data`, a view that is dead after the call."""


class StreamSink(Protocol):
    """Takes what a stream carries; every argument was verified before the call, but for a page's content."""

    def expect(self, incoming: Incoming) -> None:
        """Prepare for what the schema announces; memories and blocks are numbered as in there."""

    def take_pages(self, memory: int, indices: PageIndices) -> ArrivingPages:
        """Return what takes the content of these pages, which comes in pieces."""

    def take_zeros(self, memory: int, indices: PageIndices) -> None:
        """Make the pages `indices` zero."""

    def take_initial(self) -> None:
        """Note that all initial data has arrived."""

    def take_block(self, block: int, content: bytes) -> None:
        """Check the block's content and keep it until the end; raises StreamError when it is invalid."""

    def take_end(self, memory_digests: list[bytes], blocks_digest: bytes) -> None:
        """Compare the digests; raises StreamError when the state is not the one that was sent."""


class _Header(NamedTuple):
    kind: RecordType
    target: int  # which memory or block
    sequence: int
    pages: int
    length: int
    signed: bytes
    checksum: int  # of version 1; later ones have it behind the body


class _Arriving(NamedTuple):
    """The record of pages that is arriving."""

    pages: ArrivingPages
    page_bytes: int
    checksum: xxhash.xxh3_64  # of all but the pages


class StreamDecoder:
    """Judges a stream fed in slices of any size and hands what it carries to a sink.

    Nothing is taken on trust: a length is checked against what the schema allows before a byte is buffered
    for it, and a checksum before the sink sees the body. Pages alone are stored as they arrive, and their
    record's checksum is that of what then lies in memory. What is buffered is a page, or a record of anything
    else. After the first error every call raises that same error: a stream that failed stays failed.

    Args:
        contents: the state that this device's stream must match.
        sink: takes the content.
    """

    def __init__(self, contents: MigratableState, sink: StreamSink) -> None:
        self._contents = contents
        self._sink = sink
        self._incoming: Incoming  # from the schema on
        self._version = STREAM_VERSION
        # What comes next: the number of bytes, and the method that gets them.
        self._need = PRELUDE.size
        self._accept: Callable[[memoryview], None] = self._judge_prelude
        self._buffer = bytearray()
        self._prelude = b""
        self._header: _Header  # of the record that is arriving
        self._arriving: _Arriving | None = None
        self._in_records = False
        self._chain = 0
        self._sequence = 0
        self._blocks_seen = 0
        self.received_bytes = 0
        self.complete = False
        self.failure: StreamError | None = None

    def feed(self, data: memoryview) -> None:
        """Take the next slice of the stream, any length, also 0.

        Raises: StreamError: the stream is foreign, damaged or does not fit.
        """
        if self.failure is not None:
            raise self.failure
        try:
            self._consume(data)
        except StreamError as err:
            self.failure = err
            raise
        except Exception as err:
            # A sink that failed half-way leaves an unverified state; that is as final as a bad checksum.
            self.failure = StreamError(f"the state could not be stored: {err}")
            raise self.failure from err

    def finish(self) -> None:
        """Say that no more will come.

        Raises: StreamError: the stream failed before, or has no verified end.
        """
        if self.failure is None and not self.complete:
            where = "before its first record" if not self._in_records else f"after {self._sequence} records"
            self.failure = StreamError(f"the stream is cut off {where} ({self.received_bytes} bytes arrived)")
        if self.failure is not None:
            raise self.failure

    def _consume(self, data: memoryview) -> None:
        position, end = 0, len(data)
        while position < end:
            if self.complete:
                raise StreamError(f"{end - position} bytes follow the end of the stream")
            missing = self._need - len(self._buffer)
            taken = min(missing, end - position)
            if not self._buffer and taken == missing:
                piece = data[position : position + taken]
                if self._arriving is not None and (left := self._arriving.pages.left):
                    # Pages are stored from where they lie. Their hashes are of what was stored.
                    size = self._arriving.page_bytes
                    taken = min(left, (end - position) // size) * size
                    piece = data[position : position + taken]
                else:
                    # The client may still write to the slice: judge a copy.
                    piece = memoryview(bytes(piece))
                self.received_bytes += taken
                self._accept(piece)
            else:
                self._buffer += data[position : position + taken]
                self.received_bytes += taken
                if taken == missing:
                    whole, self._buffer = self._buffer, bytearray()
                    self._accept(memoryview(whole))
            position += taken

    def _expect(self, need: int, accept: Callable[[memoryview], None]) -> None:
        self._need, self._accept = need, accept

    # --- the start ------------------------------------------------------------------------------------------

    def _judge_prelude(self, piece: memoryview) -> None:
        magic, version, length, _ = PRELUDE.unpack(piece)
        if magic != MAGIC:
            raise StreamError(f"not a vfu-dev state stream: it starts with {magic!r}")
        if version not in READ_VERSIONS:
            age = "newer" if version > STREAM_VERSION else "older"
            raise StreamError(
                f"stream version {version} is {age} than the {STREAM_VERSION} this program reads"
            )
        if not 0 < length <= MAX_SCHEMA_BYTES:
            raise StreamError(f"the stream's schema claims {length} bytes, the limit is {MAX_SCHEMA_BYTES}")
        self._version = version
        self._prelude = bytes(piece)
        self._expect(length, self._judge_schema)

    def _judge_schema(self, piece: memoryview) -> None:
        signed, checksum = self._prelude[:-CHECKSUM_BYTES], self._prelude[-CHECKSUM_BYTES:]
        self._chain = int.from_bytes(checksum, "little")
        if xxhash.xxh3_64_intdigest(signed + bytes(piece)) != self._chain:
            raise StreamError("the stream's header is damaged: wrong checksum")
        self._incoming = judge_schema(self._contents, bytes(piece))
        self._sink.expect(self._incoming)
        self._in_records = True
        self._expect_record()

    # --- a record -------------------------------------------------------------------------------------------

    def _expect_record(self) -> None:
        size = _RECORD_V1.size if self._version == 1 else RECORD.size
        self._expect(size, self._judge_header)

    def _judge_header(self, piece: memoryview) -> None:
        """Check what can be checked before the body: type, order, index, the one length that fits."""
        checksum = 0
        if self._version == 1:
            checksum = int.from_bytes(piece[-CHECKSUM_BYTES:], "little")
            piece = piece[:-CHECKSUM_BYTES]
        kind, index, sequence, count, reserved, length = RECORD.unpack(piece)
        where = f"record {self._sequence}"
        if sequence != self._sequence:
            raise StreamError(f"{where}: its number is {sequence}: lost, repeated or out of order")
        if reserved:
            raise StreamError(f"{where}: reserved field is {reserved:#x}")
        expected = self._expected_bytes(where, kind, index, count)
        if length != expected:
            raise StreamError(f"{where}: claims {length} bytes, a record like this has {expected}")
        self._header = header = _Header(
            RecordType(kind), index, sequence, count, length, bytes(piece), checksum
        )
        if self._version > 1 and header.kind is RecordType.PAGES:
            self._expect(count * INDEX_BYTES, self._accept_indices)
        elif self._version > 1:
            self._expect(length + CHECKSUM_BYTES, self._accept_body)
        elif length:
            self._expect(length, self._accept_body_v1)
        else:
            self._accept_body_v1(piece[:0])

    def _expected_bytes(self, where: str, kind: int, index: int, count: int) -> int:
        """Return the one length that the body of such a record can have."""
        memories, blocks = self._incoming.memories, self._incoming.blocks
        if kind in (RecordType.PAGES, RecordType.ZEROS):
            if index >= len(memories):
                raise StreamError(f"{where}: memory {index} of {len(memories)}")
            if self._blocks_seen:
                raise StreamError(f"{where}: pages after a register block")
            page_size = memories[index].page_size_bytes
            limit, each = ZERO_PAGES_A_RECORD, INDEX_BYTES
            if kind == RecordType.PAGES:
                old = max(1, PAGES_BODY_BYTES_V1 // page_size)
                limit = old if self._version == 1 else pages_a_record(page_size)
                each = INDEX_BYTES + page_size
            if not 0 < count <= limit:
                raise StreamError(f"{where}: {count} pages, allowed are 1 to {limit}")
            return count * each
        if kind == RecordType.BLOCK:
            if index >= len(blocks) or index != self._blocks_seen:
                raise StreamError(f"{where}: register block {index}, expected {self._blocks_seen}")
            return blocks[index].size_bytes
        if kind == RecordType.END:
            if self._blocks_seen != len(blocks):
                raise StreamError(
                    f"{where}: the end after {self._blocks_seen} of {len(blocks)} register blocks"
                )
            return (len(memories) + 1) * DIGEST_BYTES
        if kind == RecordType.INITIAL:
            if index or count or self._blocks_seen:
                raise StreamError(f"{where}: initial data ends where it cannot")
            return 0
        raise StreamError(f"{where}: unknown type {kind}")

    def _judge_indices(self, piece: memoryview) -> PageIndices:
        """Return page indices that are known to be ascending, without repeats, and inside the memory."""
        header = self._header
        indices = np.frombuffer(piece, dtype="<u4").astype(np.intp)
        page_count = self._incoming.memories[header.target].page_count
        if (np.diff(indices) <= 0).any():
            raise StreamError(f"record {header.sequence}: page indices do not ascend")
        if indices[-1] >= page_count:
            raise StreamError(
                f"record {header.sequence}: page {indices[-1]} of a memory of {page_count} pages"
            )
        return indices

    def _judge_checksum(self, found: int, sent: int) -> None:
        if found != sent:
            raise StreamError(f"record {self._header.sequence}: wrong checksum")
        self._chain = sent
        self._sequence += 1
        self._expect_record()

    # --- pages, as they arrive ------------------------------------------------------------------------------

    def _accept_indices(self, piece: memoryview) -> None:
        header = self._header
        size = self._incoming.memories[header.target].page_size_bytes
        pages = self._sink.take_pages(header.target, self._judge_indices(piece))
        self._arriving = _Arriving(pages, size, xxhash.xxh3_64(header.signed, seed=self._chain))
        self._arriving.checksum.update(piece)
        self._expect(size, self._accept_pages)

    def _accept_pages(self, piece: memoryview) -> None:
        """Store one or more whole pages."""
        assert self._arriving is not None
        pages = self._arriving.pages
        pages.store(piece)
        if not pages.left:
            self._expect(CHECKSUM_BYTES, self._end_pages)

    def _end_pages(self, piece: memoryview) -> None:
        arriving, self._arriving = self._arriving, None
        assert arriving is not None
        arriving.checksum.update(hash_bytes(arriving.pages.hashes))
        self._judge_checksum(arriving.checksum.intdigest(), int.from_bytes(piece, "little"))

    # --- all other records, whole ---------------------------------------------------------------------------

    def _accept_body(self, piece: memoryview) -> None:
        body, checksum = piece[:-CHECKSUM_BYTES], piece[-CHECKSUM_BYTES:]
        self._take(body, int.from_bytes(checksum, "little"))

    def _accept_body_v1(self, body: memoryview) -> None:
        self._take(body, self._header.checksum)

    def _take(self, body: memoryview, sent: int) -> None:
        header = self._header
        checksum = xxhash.xxh3_64(header.signed, seed=self._chain)
        checksum.update(body)
        self._judge_checksum(checksum.intdigest(), sent)
        match header.kind:
            case RecordType.PAGES:
                split = header.pages * INDEX_BYTES
                pages = self._sink.take_pages(header.target, self._judge_indices(body[:split]))
                pages.store(body[split:])
            case RecordType.ZEROS:
                self._sink.take_zeros(header.target, self._judge_indices(body))
            case RecordType.BLOCK:
                self._sink.take_block(header.target, bytes(body))
                self._blocks_seen += 1
            case RecordType.INITIAL:
                self._sink.take_initial()
            case RecordType.END:
                digests = [bytes(body[i : i + DIGEST_BYTES]) for i in range(0, len(body), DIGEST_BYTES)]
                self._sink.take_end(digests[:-1], digests[-1])
                self.complete = True
