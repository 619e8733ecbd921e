"""The state stream on the wire: records, and the two that build and judge them.

    prelude  magic "VFUDEV\\r\\n", version, schema length, checksum: 24 bytes; then the schema, canonical JSON
    record*  32-byte header, body:
    pages    n page indices (u32, ascending), then n pages; in PRE_COPY and STOP_COPY
    zeros    n page indices (u32, ascending) of pages that are all zeros
    block    a packed register block; each once, in order, when the device stopped
    end      a 16-byte digest for each memory and one for all blocks; nothing may follow
    initial  no body: all that counted as initial is before it; again after each REINIT

All integers are little endian. Each checksum is the xxh3 of header and body seeded with the checksum before
it, the first one with that of the prelude: a record that is changed, missing, repeated, moved, or spliced in
from another stream breaks the chain at that record. The checksum finds accidents, not forgeries: it is no
signature.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from vfu_dev.errors import StreamError
from vfu_dev.memory.pages import PageIndices
from vfu_dev.migration.compat import Incoming, judge_schema
from vfu_dev.migration.schema import MAX_SCHEMA_BYTES, MigratableState

MAGIC = b"VFUDEV\r\n"  # the line end catches a transfer that "repairs" text, as in PNG
STREAM_VERSION = 1
PRELUDE = struct.Struct("<8sIIQ")  # magic, version, schema bytes, xxh3 of what precedes and the schema
RECORD = struct.Struct("<HHIIIQQ")  # type, index of memory or block, sequence, count, 0, body bytes, checksum
_UNSIGNED_BYTES = RECORD.size - 8  # the checksum covers the header up to itself
INDEX_BYTES = 4
DIGEST_BYTES = 16

# A record's body stays below this: the destination buffers at most one record, the source copies at most the
# rest of one when a read ends in its middle. 256 KiB keep gather, checksum and page hashes in the L2 cache.
PAGES_BODY_BYTES = 256 * 1024
ZERO_PAGES_A_RECORD = 8192


class RecordType(IntEnum):
    """What a record carries."""

    PAGES = 1
    ZEROS = 2
    BLOCK = 3
    END = 4
    INITIAL = 5


def pages_a_record(page_size_bytes: int) -> int:
    """Return how many pages a full record of a memory with such pages carries."""
    return max(1, PAGES_BODY_BYTES // page_size_bytes)


def pages_bytes(count: int, page_size_bytes: int) -> int:
    """Return the stream bytes of `count` pages sent in full records, framing included."""
    records = -(-count // pages_a_record(page_size_bytes))
    return records * RECORD.size + count * (INDEX_BYTES + page_size_bytes)


def zeros_bytes(count: int) -> int:
    """Return the stream bytes of `count` zero pages sent in full records, framing included."""
    return -(-count // ZERO_PAGES_A_RECORD) * RECORD.size + count * INDEX_BYTES


def prelude_bytes(contents: MigratableState) -> int:
    """Return the stream bytes before the first record."""
    return PRELUDE.size + len(contents.schema)


def tail_bytes(contents: MigratableState) -> int:
    """Return the stream bytes that only STOP_COPY can carry: register blocks and the end record."""
    blocks = sum(RECORD.size + block.size_bytes for block in contents.blocks)
    return blocks + RECORD.size + (len(contents.memories) + 1) * DIGEST_BYTES


Segment = memoryview | bytes


# What says that initial data is complete.
INITIAL_END_BYTES = RECORD.size


class StreamEncoder:
    """Builds records; each method returns the segments of one, in order, without copying a payload."""

    def __init__(self) -> None:
        self._chain = 0
        self._sequence = 0

    def prelude(self, schema: bytes) -> list[Segment]:
        """Return what the stream starts with."""
        head = PRELUDE.pack(MAGIC, STREAM_VERSION, len(schema), 0)[:-8]
        self._chain = xxhash.xxh3_64_intdigest(head + schema)
        return [head + self._chain.to_bytes(8, "little"), schema]

    def record(self, kind: RecordType, index: int, count: int, body: list[Segment]) -> list[Segment]:
        """Return a record with `body`; the payload's content must not change until it was sent or copied."""
        length = sum(len(segment) for segment in body)
        head = RECORD.pack(kind, index, self._sequence, count, 0, length, 0)[:_UNSIGNED_BYTES]
        checksum = xxhash.xxh3_64(head, seed=self._chain)
        for segment in body:
            checksum.update(segment)
        self._chain = checksum.intdigest()
        self._sequence += 1
        return [head + self._chain.to_bytes(8, "little"), *body]


class StreamSink(Protocol):
    """Takes what a stream carries; every argument was verified before the call."""

    def expect(self, incoming: Incoming) -> None:
        """Prepare for what the schema announces; memories and blocks are numbered as in there."""

    def take_pages(self, memory: int, indices: PageIndices, payload: npt.NDArray[np.uint8]) -> None:
        """Store `payload`, shape (n, page_size_bytes), a view that is dead after the call."""

    def take_zeros(self, memory: int, indices: PageIndices) -> None:
        """Make the pages `indices` zero."""

    def take_initial(self) -> None:
        """Note that all initial data has arrived."""

    def take_block(self, block: int, content: bytes) -> None:
        """Judge the block's content and keep it until the end; raises StreamError when it cannot be."""

    def take_end(self, memory_digests: list[bytes], blocks_digest: bytes) -> None:
        """Compare the digests; raises StreamError when the state is not the one that was sent."""


class _Header(NamedTuple):
    kind: RecordType
    target: int  # which memory or block
    sequence: int
    pages: int
    length: int
    checksum: int
    signed: bytes


class StreamDecoder:
    """Judges a stream fed in slices of any size and hands what is verified to a sink.

    Nothing is taken on trust: a length is checked against what the schema allows before a byte is buffered
    for it, a checksum before the sink sees the body. One record at most is buffered. After the first error
    every call raises that same error: a stream that failed stays failed.

    Args:
        contents: what this device's stream must look like.
        sink: takes the content.
    """

    def __init__(self, contents: MigratableState, sink: StreamSink) -> None:
        self._contents = contents
        self._sink = sink
        self._incoming: Incoming  # from the schema on
        self._buffer = bytearray()
        self._need = PRELUDE.size
        self._schema_checksum: tuple[bytes, int] | None = None  # of the prelude, while the schema is awaited
        self._header: _Header | None = None
        self._in_records = False
        self._chain = 0
        self._sequence = 0
        self._blocks_seen = 0
        self.received_bytes = 0
        self.complete = False
        self.failure: StreamError | None = None

    def feed(self, data: memoryview) -> None:
        """Take the next slice of the stream, any length, also 0.

        Raises:  StreamError: the stream is foreign, damaged or does not fit; nothing unverified reached the
        sink.
        """
        if self.failure is not None:
            raise self.failure
        try:
            self._consume(data)
        except StreamError as err:
            self.failure = err
            raise
        except Exception as err:
            # A sink that failed half-way leaves a state nobody verified; that is as final as a bad checksum.
            self.failure = StreamError(f"the state could not be stored: {err}")
            raise self.failure from err

    def finish(self) -> None:
        """Say that no more will come.

        Raises:  StreamError: the stream failed before, or has no verified end.
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
            if not self._buffer and end - position >= missing:
                # The whole piece lies in the caller's buffer: judge it there, copy nothing.
                piece = data[position : position + missing]
                position += missing
                self.received_bytes += missing
                self._accept(piece)
                continue
            taken = min(missing, end - position)
            self._buffer += data[position : position + taken]
            position += taken
            self.received_bytes += taken
            if len(self._buffer) == self._need:
                whole, self._buffer = self._buffer, bytearray()
                self._accept(memoryview(whole))

    def _accept(self, piece: memoryview) -> None:
        """Judge one whole piece: prelude, schema, record header or record body."""
        if self._header is not None:
            header, self._header = self._header, None
            self._need = RECORD.size
            self._accept_body(header, piece)
        elif self._in_records:
            header = self._judge_header(piece)
            if header.length:
                self._header, self._need = header, header.length
            else:
                self._accept_body(header, piece[:0])
        elif self._schema_checksum is not None:
            signed, checksum = self._schema_checksum
            if xxhash.xxh3_64_intdigest(signed + bytes(piece)) != checksum:
                raise StreamError("the stream's header is damaged: wrong checksum")
            self._incoming = judge_schema(self._contents, bytes(piece))
            self._sink.expect(self._incoming)
            self._chain = checksum
            self._in_records = True
            self._need = RECORD.size
        else:
            self._judge_prelude(piece)

    def _judge_prelude(self, piece: memoryview) -> None:
        magic, version, length, checksum = PRELUDE.unpack(piece)
        if magic != MAGIC:
            raise StreamError(f"not a vfu-dev state stream: it starts with {magic!r}")
        if version != STREAM_VERSION:
            age = "newer" if version > STREAM_VERSION else "older"
            raise StreamError(
                f"stream version {version} is {age} than the {STREAM_VERSION} this program reads"
            )
        if not 0 < length <= MAX_SCHEMA_BYTES:
            raise StreamError(f"the stream's schema claims {length} bytes, the limit is {MAX_SCHEMA_BYTES}")
        self._schema_checksum = bytes(piece[:-8]), checksum
        self._need = length

    def _judge_header(self, piece: memoryview) -> _Header:
        """Check what can be checked before the body: type, order, index, the one length that fits."""
        kind, index, sequence, count, reserved, length, checksum = RECORD.unpack(piece)
        where = f"record {self._sequence}"
        if sequence != self._sequence:
            raise StreamError(f"{where}: its number is {sequence}: lost, repeated or out of order")
        if reserved:
            raise StreamError(f"{where}: reserved field is {reserved:#x}")
        memories, blocks = self._incoming.memories, self._incoming.blocks
        if kind in (RecordType.PAGES, RecordType.ZEROS):
            if index >= len(memories):
                raise StreamError(f"{where}: memory {index} of {len(memories)}")
            if self._blocks_seen:
                raise StreamError(f"{where}: pages after a register block")
            page_size = memories[index].page_size_bytes
            if kind == RecordType.PAGES:
                limit, expected = pages_a_record(page_size), count * (INDEX_BYTES + page_size)
            else:
                limit, expected = ZERO_PAGES_A_RECORD, count * INDEX_BYTES
            if not 0 < count <= limit:
                raise StreamError(f"{where}: {count} pages, allowed are 1 to {limit}")
        elif kind == RecordType.BLOCK:
            if index >= len(blocks) or index != self._blocks_seen:
                raise StreamError(f"{where}: register block {index}, expected {self._blocks_seen}")
            expected = blocks[index].size_bytes
        elif kind == RecordType.END:
            if self._blocks_seen != len(blocks):
                raise StreamError(
                    f"{where}: the end after {self._blocks_seen} of {len(blocks)} register blocks"
                )
            expected = (len(memories) + 1) * DIGEST_BYTES
        elif kind == RecordType.INITIAL:
            if index or count or self._blocks_seen:
                raise StreamError(f"{where}: initial data ends where it cannot")
            expected = 0
        else:
            raise StreamError(f"{where}: unknown type {kind}")
        if length != expected:
            raise StreamError(f"{where}: claims {length} bytes, a record like this has {expected}")
        return _Header(
            RecordType(kind), index, sequence, count, length, checksum, bytes(piece[:_UNSIGNED_BYTES])
        )

    def _accept_body(self, header: _Header, body: memoryview) -> None:
        where = f"record {header.sequence}"
        checksum = xxhash.xxh3_64(header.signed, seed=self._chain)
        checksum.update(body)
        if checksum.intdigest() != header.checksum:
            raise StreamError(f"{where}: wrong checksum")
        self._chain = header.checksum
        self._sequence += 1
        match header.kind:
            case RecordType.PAGES:
                split = header.pages * INDEX_BYTES
                indices = self._judge_indices(header, body[:split])
                payload = np.frombuffer(body[split:], dtype=np.uint8).reshape(header.pages, -1)
                self._sink.take_pages(header.target, indices, payload)
            case RecordType.ZEROS:
                self._sink.take_zeros(header.target, self._judge_indices(header, body))
            case RecordType.BLOCK:
                self._sink.take_block(header.target, bytes(body))
                self._blocks_seen += 1
            case RecordType.INITIAL:
                self._sink.take_initial()
            case RecordType.END:
                digests = [bytes(body[i : i + DIGEST_BYTES]) for i in range(0, len(body), DIGEST_BYTES)]
                self._sink.take_end(digests[:-1], digests[-1])
                self.complete = True

    def _judge_indices(self, header: _Header, piece: memoryview) -> PageIndices:
        """Return page indices that are known to be ascending, without repeats, and inside the memory."""
        indices = np.frombuffer(piece, dtype="<u4").astype(np.intp)
        page_count = self._incoming.memories[header.target].page_count
        if (np.diff(indices) <= 0).any():
            raise StreamError(f"record {header.sequence}: page indices do not ascend")
        if indices[-1] >= page_count:
            raise StreamError(
                f"record {header.sequence}: page {indices[-1]} of a memory of {page_count} pages"
            )
        return indices
