"""The state stream on the wire, and what builds it; `decoder` judges it.

    prelude  magic "VFUDEV\\r\\n", version, schema length, checksum: 24 bytes; then the schema, canonical JSON
    record*  24-byte header, body, checksum
    pages    n page indices (u32, ascending), then n pages; in PRE_COPY and STOP_COPY
    zeros    n page indices (u32, ascending) of pages that are all zeros
    block    a packed register block; each once, in order, when the device stopped
    end      a 16-byte digest for each memory and one for all blocks; nothing may follow
    initial  no body: all that counted as initial is before it; again after each REINIT

All integers are little endian. Each checksum is the xxh3 of header and body seeded with the checksum before
it, the first one with that of the prelude: a record that is changed, missing, repeated, moved, or spliced in
from another stream breaks the chain at that record. In the place of each page the checksum covers the page's
hash (`vfu_dev.memory.kernels`), so that no page is read once for its hash and once more for its record. The
checksum comes last, and so nothing of a record has to be known before it is sent. It finds accidents, not
forgeries: it is no signature.

Version 1, which is still read, had the checksum at the end of a header of 32 bytes, over header and body as
they are, and at most 256 KiB of pages in a record.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import xxhash

from vfu_dev.memory.pages import PageIndices
from vfu_dev.memory.sending import CHECKSUM_BYTES, INDEX_BYTES, Record
from vfu_dev.migration.schema import MigratableState

MAGIC = b"VFUDEV\r\n"  # the line end catches a transfer that "repairs" text, as in PNG
STREAM_VERSION = 2
READ_VERSIONS = (1, 2)
PRELUDE = struct.Struct("<8sIIQ")  # magic, version, schema bytes, xxh3 of what precedes and the schema
RECORD = struct.Struct("<HHIIIQ")  # type, index of memory or block, sequence, count, 0, body bytes
FRAME_BYTES = RECORD.size + CHECKSUM_BYTES
DIGEST_BYTES = 16

# Four times what a client reads at a time: what a record costs whatever it carries is paid once for that.
PAGES_BODY_BYTES = 4 << 20
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
    return records * FRAME_BYTES + count * (INDEX_BYTES + page_size_bytes)


def zeros_bytes(count: int) -> int:
    """Return the stream bytes of `count` zero pages sent in full records, framing included."""
    return -(-count // ZERO_PAGES_A_RECORD) * FRAME_BYTES + count * INDEX_BYTES


def prelude_bytes(contents: MigratableState) -> int:
    """Return the stream bytes before the first record."""
    return PRELUDE.size + len(contents.schema)


def tail_bytes(contents: MigratableState) -> int:
    """Return the stream bytes that only STOP_COPY can carry: register blocks and the end record."""
    blocks = sum(FRAME_BYTES + block.size_bytes for block in contents.blocks)
    return blocks + FRAME_BYTES + (len(contents.memories) + 1) * DIGEST_BYTES


# What says that initial data is complete.
INITIAL_END_BYTES = FRAME_BYTES


class StreamEncoder:
    """Builds records, one after the other: no record is begun before the last one was handed out."""

    def __init__(self) -> None:
        self._checksum: bytes | memoryview = bytes(CHECKSUM_BYTES)  # of what came last; the next one's seed
        self._sequence = 0

    def prelude(self, schema: bytes) -> bytes:
        """Return what the stream starts with."""
        head = PRELUDE.pack(MAGIC, STREAM_VERSION, len(schema), 0)[:-CHECKSUM_BYTES]
        self._checksum = xxhash.xxh3_64_intdigest(head + schema).to_bytes(CHECKSUM_BYTES, "little")
        return head + self._checksum + schema

    def _header(self, kind: RecordType, index: int, count: int, body_bytes: int) -> bytes:
        self._sequence += 1
        return RECORD.pack(kind, index, self._sequence - 1, count, 0, body_bytes)

    @property
    def _seed(self) -> int:
        return int.from_bytes(self._checksum, "little")

    def record(self, kind: RecordType, index: int, count: int, body: bytes) -> bytes:
        """Return a whole record of anything but pages."""
        covered = self._header(kind, index, count, len(body)) + body
        self._checksum = xxhash.xxh3_64_intdigest(covered, self._seed).to_bytes(CHECKSUM_BYTES, "little")
        return covered + self._checksum

    def pages(self, index: int, record: Record, taken: PageIndices) -> int:
        """Have `record` begin with the pages `taken` of memory `index`; return the bytes that it has."""
        body_bytes: int = len(taken) * (INDEX_BYTES + record.rows.shape[1])
        record.begin(self._header(RecordType.PAGES, index, len(taken), body_bytes), taken, self._seed)
        self._checksum = record.checksum
        return body_bytes + FRAME_BYTES
