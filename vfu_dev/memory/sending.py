"""Records of pages on their way out: native/kernels/send.c does all that is done to their bytes.

A record is a run of bytes: first ones that say which pages follow, the pages, and a checksum of the first
bytes and of the pages' hashes. A reply takes the next bytes of it, of any number: as vectors that refer to
device memory, or as a copy. A page is hashed, and noted as sent, when its first byte is handed out. Nothing
of this is done in Python, which takes longer for 1 MiB than the hash does.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from vfu_dev.memory import kernels
from vfu_dev.memory.fingerprints import Fingerprints
from vfu_dev.memory.kernels import Hashes, Pages, Vectors
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DATA, Codes, PageIndices

CHECKSUM_BYTES = 8
INDEX_BYTES = 4

# The content was not scanned since it was written, but it is sent as data.
SENT_CODE = CODE_DATA | CODE_CLEAN

_NO_PAGES: PageIndices = np.empty(0, dtype=np.intp)


class _RecordStruct(ctypes.Structure):
    """struct record of send.c."""

    _fields_ = kernels.members(
        *("base", "size", "page_count", "codes", "hashes", "zero_hash", "sent_code", "parts"),
        *("key", "fingerprints", "scratch"),
        *("covered", "first_size", "list", "n", "last_size", "seed", "again", "again_n"),
        *("at", "done", "again_at", "part"),
    )


class _ReplyStruct(ctypes.Structure):
    """struct reply of send.c."""

    _fields_ = kernels.members("vectors", "most", "n", "pool", "pool_size", "pool_used")


class Record:
    """One record after the other, of the pages of one memory.

    Args:
        rows: the memory, shape (page_count, page_size_bytes).
        codes: of its pages; SENT_CODE is stored as a page is handed out.
        hashes: of its pages, shape (page_count,); stored at the same time.
        fingerprints: of a memory that a guest may write to: what is sent are copies, whose fingerprints are
            stored there.

    Attributes:
        taken: the pages of the record, ascending.
        again: those of them that keep their codes, ascending: they are to be sent once more.
        covered: the first bytes, a hash for each page, and the checksum, once it was handed out.
        struct: what C has of all this.
    """

    def __init__(
        self, rows: Pages, codes: Codes, hashes: Hashes, fingerprints: Fingerprints | None = None
    ) -> None:
        self.rows, self.codes, self.hashes, self.fingerprints = rows, codes, hashes, fingerprints
        self.taken = self.again = _NO_PAGES
        self.covered: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self.parts = np.empty((2, rows.shape[1]), dtype=np.uint8)
        self.struct = _RecordStruct(
            base=kernels.address(rows),
            size=rows.shape[1],
            page_count=len(rows),
            codes=kernels.address(codes),
            hashes=kernels.address(hashes),
            zero_hash=kernels.zero_page_xxh3(rows.shape[1]) if rows.size else 0,
            sent_code=SENT_CODE,
            parts=kernels.address(self.parts),
        )
        if fingerprints is not None:
            self._scratch = np.empty(rows.shape[1], dtype=np.uint8)
            self.struct.key = kernels.address(fingerprints.key)
            self.struct.fingerprints = kernels.address(fingerprints.sent)
            self.struct.scratch = kernels.address(self._scratch)
        self.address = ctypes.addressof(self.struct)

    def begin(self, header: bytes, taken: PageIndices, seed: int) -> None:
        """Begin the record of the pages `taken`, ascending: `header` and their numbers come first.

        Args: seed: of the checksum.
        Raises: IndexError: a page is not there; the record before is left as it was.
        """
        count = len(taken)
        first_bytes = len(header) + count * INDEX_BYTES
        skipped = -first_bytes % 8  # the hashes are numbers of 64 bits, and numpy's memory begins at such
        covered = np.empty(skipped + first_bytes + count * 8 + CHECKSUM_BYTES, dtype=np.uint8)[skipped:]
        chosen = kernels.page_list(taken)
        begin(self, header, covered, chosen, seed)
        self.taken, self.again, self.covered = chosen, _NO_PAGES, covered

    def begin_bytes(self, data: bytes) -> None:
        """Begin a record that is just `data`."""
        self.covered = np.frombuffer(data, dtype=np.uint8)
        self.struct.covered, self.struct.first_size = kernels.address(self.covered), len(data)
        self.struct.at = 0

    @property
    def checksum(self) -> memoryview:
        """Where the checksum is, once it was handed out."""
        return self.covered[-CHECKSUM_BYTES:].data

    @property
    def pending(self) -> PageIndices:
        """The pages that were not handed out, ascending; they are sent as they will be then."""
        return self.taken[self.struct.done :]

    def send_again(self, pages: PageIndices) -> None:
        """Note that the pages `pages` are dirty even if the rest of the record has them."""
        self.again = kernels.page_list(np.union1d(self.again, np.intersect1d(self.pending, pages)))
        self.struct.again, self.struct.again_n = kernels.address(self.again), len(self.again)
        self.struct.again_at = 0


def plain_record() -> Record:
    """Return what takes bytes alone."""
    return Record(np.empty((0, 0), np.uint8), np.empty(0, np.uint8), np.empty(0, np.uint64))


class Reply:
    """What one reply consists of, as vectors.

    Attributes:
        alive: what they refer to, apart from device memory and the record under way.
        struct: what C has of it.
    """

    def __init__(self) -> None:
        self.alive: list[Any] = []
        self.room = np.empty((0, 2), dtype=np.uint64)
        self.pool: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self.struct = _ReplyStruct()
        self.address = ctypes.addressof(self.struct)

    def begin(self) -> None:
        """Begin a new one."""
        self.struct.n = self.struct.pool_used = 0
        self.alive.clear()

    @property
    def vectors(self) -> Vectors:
        """The vectors so far, in order, shape (n, 2); until the next reply begins."""
        return self.room[: self.struct.n]

    def grow(self, room_bytes: int) -> None:
        """Have room for all that the next `room_bytes` may need."""
        self.alive.append(self.pool)  # what is in use of it
        vectors = self.vectors
        # Untouched memory costs nothing.
        self.room = np.empty((2 * len(vectors) + room_bytes // 1024 + 64, 2), dtype=np.uint64)
        self.room[: len(vectors)] = vectors
        self.pool = np.empty(max(room_bytes, 1 << 20), dtype=np.uint8)
        struct = self.struct
        struct.vectors, struct.most = kernels.address(self.room), len(self.room)
        struct.pool, struct.pool_size, struct.pool_used = kernels.address(self.pool), len(self.pool), 0


def begin(
    record: Record, header: bytes, covered: npt.NDArray[np.uint8], taken: PageIndices, seed: int
) -> None:
    """Store the first bytes of a record; see `Record.begin`."""
    status = kernels.library().vfu_begin_record(
        record.address,
        header,
        len(header),
        kernels.address(covered),
        kernels.address(taken),
        len(taken),
        seed,
    )
    kernels.outside(status)


def send(record: Record, reply: Reply, room: int, out: int = 0, fd: int = -1) -> int:
    """Hand out the next bytes of `record`, `room` at most, to `reply`; or as a copy to the address `out`.

    Somebody else may write to `out`: nothing is read back from there.

    Args: fd: where something to be read ends a copy early; -1: nowhere.
    Returns: how many that were. 0: the reply has to `grow` first.
    """
    return kernels.library().vfu_send(record.address, reply.address, out, room, fd)  # type: ignore[no-any-return]
