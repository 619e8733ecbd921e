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

from vfu_dev.memory.kernels import Hashes
from vfu_dev.migration.schema import MigratableState

MAGIC = b"VFUDEV\r\n"  # the line end catches a transfer that "repairs" text, as in PNG
STREAM_VERSION = 2
READ_VERSIONS = (1, 2)
PRELUDE = struct.Struct("<8sIIQ")  # magic, version, schema bytes, xxh3 of what precedes and the schema
RECORD = struct.Struct("<HHIIIQ")  # type, index of memory or block, sequence, count, 0, body bytes
CHECKSUM_BYTES = 8
FRAME_BYTES = RECORD.size + CHECKSUM_BYTES
INDEX_BYTES = 4
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
    """Builds records: `begin`, `cover` for all of the body in order, `end`; or `record` for all at once."""

    def __init__(self) -> None:
        self._chain = 0
        self._sequence = 0
        self._checksum = xxhash.xxh3_64()

    def prelude(self, schema: bytes) -> bytes:
        """Return what the stream starts with."""
        head = PRELUDE.pack(MAGIC, STREAM_VERSION, len(schema), 0)[:-CHECKSUM_BYTES]
        self._chain = xxhash.xxh3_64_intdigest(head + schema)
        return head + self._chain.to_bytes(CHECKSUM_BYTES, "little") + schema

    def begin(self, kind: RecordType, index: int, count: int, body_bytes: int) -> bytes:
        """Return the header of a record."""
        head = RECORD.pack(kind, index, self._sequence, count, 0, body_bytes)
        self._checksum = xxhash.xxh3_64(head, seed=self._chain)
        self._sequence += 1
        return head

    def cover(self, part: bytes) -> None:
        """Have the checksum cover `part` of the body, which is sent as it is."""
        self._checksum.update(part)

    def cover_pages(self, hashes: Hashes) -> None:
        """Have the checksum cover pages that have these hashes, shape (n,)."""
        self._checksum.update(hash_bytes(hashes))

    def end(self) -> bytes:
        """Return the checksum, which ends the record."""
        self._chain = self._checksum.intdigest()
        return self._chain.to_bytes(CHECKSUM_BYTES, "little")

    def record(self, kind: RecordType, index: int, count: int, body: bytes) -> bytes:
        """Return a whole record of anything but pages."""
        head = self.begin(kind, index, count, len(body))
        self.cover(body)
        return head + body + self.end()


def hash_bytes(hashes: Hashes) -> memoryview:
    """Return what a checksum covers in the place of pages with these hashes."""
    return hashes.astype("<u8", copy=False).data.cast("B")
