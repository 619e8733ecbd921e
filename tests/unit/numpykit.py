"""What the kernels do, in numpy and Python: slower, and plain to see. Tests compare the kernels with it.

The functions have the names, arguments and results of those in `vfu_dev.memory.kernels` and
`vfu_dev.memory.sending`.
"""

from __future__ import annotations

import ctypes
import importlib

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from vfu_dev.memory.kernels import MAX_BLOCK_BYTES, Fingerprints, Hashes, Key, Pages, Target
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DATA, PageIndices
from vfu_dev.memory.sending import SENT_CODE, Record, Reply


def _inside(indices: PageIndices, page_count: int) -> None:
    if len(indices) and (indices.min() < 0 or indices.max() >= page_count):
        raise IndexError("a page that is not there")


def _hash(pages: Pages) -> Hashes:
    zero = np.uint64(xxhash.xxh3_64_intdigest(bytes(pages.shape[1])))
    return np.array([xxhash.xxh3_64_intdigest(page.tobytes()) for page in pages], dtype=np.uint64) ^ zero


def hash_pages(pages: Pages, indices: PageIndices) -> Hashes:
    _inside(indices, len(pages))
    return _hash(pages[indices])


def begin(record: Record, header: bytes, covered: Pages, taken: PageIndices, seed: int) -> None:
    _inside(taken, len(record.rows))
    first = header + taken.astype("<u4").tobytes()
    covered[: len(first)] = np.frombuffer(first, dtype=np.uint8)
    for name, value in {
        "first_size": len(first),
        "n": len(taken),
        "last_size": 8,
        "seed": seed,
    }.items():
        setattr(record.struct, name, value)
    record.struct.at = record.struct.done = record.struct.again_n = 0


def send(record: Record, reply: Reply, room: int, out: int = 0, fd: int = -1) -> int:
    """Hand out one byte sequence, whichever way: a page that is split waits in `parts`."""
    struct, size = record.struct, record.rows.shape[1]
    first, pages_end = struct.first_size, struct.first_size + struct.n * size
    found = [record.covered[:first][struct.at :][:room].tobytes()]
    at = struct.at + len(found[0])
    while first <= at < pages_end and (left := room - sum(map(len, found))):
        number, inside = divmod(at - first, size)
        if number == struct.done:
            page = record.taken[number]
            record.parts[:] = record.rows[page]
            record.hashes[page] = _hash(record.rows[page : page + 1])[0]
            record.covered[first + 8 * number :][:8] = np.frombuffer(record.hashes[page].tobytes(), np.uint8)
            if (prints := record.fingerprints) is not None:
                prints.sent[page] = fingerprints_of(record.rows[page : page + 1], prints.key)[0]
            if page not in record.again:
                record.codes[page] = SENT_CODE
            struct.done += 1
        found.append(record.parts[0, inside:][:left].tobytes())
        at += len(found[-1])
    if at >= pages_end and struct.last_size:
        covered = record.covered[: first + 8 * struct.n].tobytes()
        checksum = xxhash.xxh3_64_intdigest(covered, struct.seed).to_bytes(8, "little")
        record.covered[-8:] = np.frombuffer(checksum, dtype=np.uint8)
        found.append(checksum[at - pages_end :][: room - sum(map(len, found))])
    data = np.frombuffer(b"".join(found), dtype=np.uint8).copy()
    struct.at += len(data)
    if out:
        ctypes.memmove(out, data.tobytes(), len(data))
    else:
        if reply.struct.n == len(reply.room):
            reply.grow(room)
        reply.alive.append(data)
        reply.room[reply.struct.n] = data.__array_interface__["data"][0], len(data)
        reply.struct.n += 1
    return len(data)


def zero_pages(pages: Pages, indices: PageIndices) -> npt.NDArray[np.bool_]:
    _inside(indices, len(pages))
    return ~pages[indices].any(axis=1)


def fingerprints_of(pages: Pages, key: Key) -> Fingerprints:
    """Return the fingerprints of `pages`: NH, the sum of products of neighbouring 32-bit words plus key."""
    blocks = pages.reshape(-1, min(pages.shape[1], MAX_BLOCK_BYTES)).view(np.uint32)
    found = np.zeros((len(blocks), 2), dtype=np.uint64)
    for which in range(2):
        words = blocks + key[2 + which :].view(np.uint32)[: blocks.shape[1]]
        pairs = words.astype(np.uint64)
        found[:, which] = (pairs[:, ::2] * pairs[:, 1::2]).sum(axis=1, dtype=np.uint64)
    found ^= key[:2]
    return found.reshape(len(pages), 2 * max(1, pages.shape[1] // MAX_BLOCK_BYTES))


def changed_pages(
    pages: Pages, key: Key, fingerprints: Fingerprints, codes: npt.NDArray[np.uint8], first: int, end: int
) -> tuple[PageIndices, int]:
    clean = np.flatnonzero(codes[first:end] >= CODE_CLEAN) + first
    return clean[(fingerprints_of(pages[clean], key) != fingerprints[clean]).any(axis=1)], len(clean)


class Arriving:
    """The same."""

    def __init__(
        self, page_size_bytes: int, indices: PageIndices, page_hashes: Hashes, target: Target | None
    ) -> None:
        self._size = page_size_bytes
        self._indices = indices
        self._page_hashes = page_hashes
        self._target = target
        self.hashes: Hashes = np.empty(0, dtype=np.uint64)

    @property
    def left(self) -> int:
        """The same."""
        return len(self._indices) - len(self.hashes)

    def store(self, data: memoryview) -> None:
        """The same."""
        payload = np.frombuffer(data, dtype=np.uint8).reshape(-1, self._size)
        done = len(self.hashes)
        where = self._indices[done : done + len(payload)]
        if len(payload) > self.left:
            raise IndexError("a page that is not expected")
        _inside(where, len(self._page_hashes))
        hashes = _hash(payload)
        if self._target is not None:
            rows, codes, old = self._target
            rows[where] = payload
            hashes = _hash(rows[where])
            codes[where] = CODE_DATA
            old[where] = False
        self._page_hashes[where] = hashes
        self.hashes = np.concatenate([self.hashes, hashes])


USES = {
    "vfu_dev.memory.device_memory": ("zero_pages",),
    "vfu_dev.memory.fingerprints": ("changed_pages",),
    "vfu_dev.migration.audit": ("hash_pages",),
    "vfu_dev.memory.sending": ("begin",),
    "vfu_dev.migration.outgoing": ("send",),
    "vfu_dev.migration.resume": ("Arriving",),
}


def use_numpy(patch: pytest.MonkeyPatch) -> None:
    """Put these functions in the place of the kernels, wherever those are called."""
    for name, functions in USES.items():
        module = importlib.import_module(name)
        for function in functions:
            assert getattr(module, function).__module__.startswith("vfu_dev.memory.")
            patch.setattr(module, function, globals()[function])
