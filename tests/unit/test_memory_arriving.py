"""Pages that arrive: C does what numpy does, in whatever pieces they come, and touches nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import debkit
import hypothesis.strategies as st
import numpy as np
import numpykit
import pytest
from hypothesis import given

from vfu_dev.memory import DeviceMemory, kernels
from vfu_dev.memory.kernels import Target
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DATA, CODE_DIRTY, CODE_NEVER, CODE_ZERO

PAGES = 40
# Above 16 KiB, and where the first page is not at a multiple of 64, C stores in another way.
SIZES = st.sampled_from([64, 128, 4096, 16384, 65536])
CHOSEN = st.sets(st.integers(0, PAGES - 1), min_size=1).map(sorted)
ALIGNMENT = 64


class Memory(NamedTuple):
    """A memory, its pages' codes and hashes, all in plain arrays."""

    target: Target
    page_hashes: kernels.Hashes

    def copy(self) -> Memory:
        """Return the same in arrays of its own, aligned as these are."""
        rows, codes, old = self.target
        copy = aligned(rows.shape, rows.ctypes.data % ALIGNMENT)
        copy[:] = rows
        return Memory(Target(copy, codes.copy(), old.copy()), self.page_hashes.copy())

    def same_as(self, other: Memory) -> bool:
        """Return whether all of it is the same."""
        ours, theirs = (*self.target, self.page_hashes), (*other.target, other.page_hashes)
        return all(np.array_equal(one, another) for one, another in zip(ours, theirs, strict=True))


def aligned(shape: tuple[int, ...], at: int) -> kernels.Pages:
    """Return an array that begins `at` bytes behind a multiple of ALIGNMENT."""
    size = int(np.prod(shape))
    room = np.zeros(size + 2 * ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALIGNMENT + at
    return room[start : start + size].reshape(shape)


def some_memory(seed: int, size: int, at: int = 0) -> Memory:
    rng = np.random.default_rng(seed)
    rows = aligned((PAGES, size), at)
    rows[:] = rng.integers(0, 256, rows.shape, dtype=np.uint8)
    known = np.array([CODE_NEVER, CODE_DIRTY, CODE_ZERO, CODE_DATA | CODE_CLEAN], np.uint8)
    codes = rng.choice(known, PAGES)
    old = rng.integers(0, 2, PAGES).astype(np.bool_)
    return Memory(Target(rows, codes, old), rng.integers(1, 1 << 60, PAGES, dtype=np.uint64))


def payload_of(seed: int, count: int, size: int) -> kernels.Pages:
    """Return `count` pages, each third one of zeros."""
    payload = np.random.default_rng(seed).integers(0, 256, (count, size), dtype=np.uint8)
    payload[::3] = 0
    return payload


@given(
    st.integers(0, 2**32),
    SIZES,
    CHOSEN,
    st.lists(st.integers(0, PAGES), max_size=6),
    st.sampled_from([0, 8, 16, 32]),
    st.booleans(),
)
def test_c_does_what_numpy_does_in_any_pieces(
    seed: int, size: int, chosen: list[int], cuts: list[int], at: int, hash_only: bool
) -> None:
    before = some_memory(seed, size, at)
    indices, payload = np.array(chosen, dtype=np.intp), payload_of(seed, len(chosen), size)
    sent = aligned((payload.nbytes,), at)  # as it lies behind a header
    sent[:] = payload.reshape(-1)
    edges = sorted({0, len(chosen), *(cut for cut in cuts if cut < len(chosen))})
    results = []
    for module in (kernels, numpykit):
        memory = before.copy()
        target = None if hash_only else memory.target
        arriving = module.Arriving(size, indices, memory.page_hashes, target)
        for start, end in pairwise(edges):
            assert arriving.left == len(chosen) - start
            arriving.store(memoryview(sent[start * size : end * size]))
            assert len(arriving.hashes) == end
        assert arriving.left == 0
        results.append((memory, arriving.hashes))
    (ours, hashes), (theirs, expected) = results
    assert ours.same_as(theirs)
    assert np.array_equal(hashes, expected)
    assert (hashes[::3] == 0).all()
    assert np.array_equal(ours.page_hashes[indices], hashes)
    if hash_only:
        assert all(np.array_equal(a, b) for a, b in zip(ours.target, before.target, strict=True))
    else:
        assert np.array_equal(ours.target.rows[indices], payload)
        assert np.array_equal(hashes, kernels.hash_pages(ours.target.rows, indices))
        others = np.setdiff1d(np.arange(PAGES), indices)
        for after, was in zip(ours.target, before.target, strict=True):
            assert np.array_equal(after[others], was[others])


@pytest.mark.parametrize("module", [kernels, numpykit])
@pytest.mark.parametrize(
    ("chosen", "count"), [([-1], 1), ([0, PAGES], 2), ([3, 1 << 40], 2), ([1, 2], 3)], ids=str
)
def test_a_page_that_is_not_there_or_not_expected_is_refused_and_nothing_is_touched(
    module: Any, chosen: list[int], count: int
) -> None:
    memory = some_memory(1, 64)
    before = memory.copy()
    arriving = module.Arriving(64, np.array(chosen, dtype=np.intp), memory.page_hashes, memory.target)
    with pytest.raises(IndexError):
        arriving.store(memoryview(bytes(64 * count)))
    assert memory.same_as(before)
    assert arriving.left == len(chosen)
    assert len(arriving.hashes) == 0


@pytest.mark.parametrize("module", [kernels, numpykit])
def test_no_more_is_taken_than_is_left(module: Any) -> None:
    memory = some_memory(1, 64)
    indices = np.array([1, 2, 5, 6])[:3]  # what is behind it must not be taken for one more
    arriving = module.Arriving(64, indices, memory.page_hashes, memory.target)
    arriving.store(memoryview(bytes(2 * 64)))
    before = memory.copy()
    with pytest.raises(IndexError):
        arriving.store(memoryview(bytes(2 * 64)))
    assert memory.same_as(before)
    assert arriving.left == 1


# Records the calls of madvise(2), and does not make them.
MADVISE = """
#include <stddef.h>
size_t calls; struct { char *start; size_t size; int advice; } seen[64];
int madvise(void *start, size_t size, int advice)
{
    if (calls < 64) {
        seen[calls].start = start; seen[calls].size = size; seen[calls++].advice = advice;
    }
    return 0;
}
"""
ASKS = """
import ctypes, mmap
import numpy as np
from vfu_dev.memory import kernels

class Seen(ctypes.Structure):
    _fields_ = [("start", ctypes.c_size_t), ("size", ctypes.c_size_t), ("advice", ctypes.c_int)]

kernels.open_kernels()
preloaded = ctypes.CDLL(None)
calls = ctypes.c_size_t.in_dll(preloaded, "calls")
seen = (Seen * 64).in_dll(preloaded, "seen")
rows = np.frombuffer(mmap.mmap(-1, 64 * 4096), np.uint8).reshape(64, 4096)
codes, old = np.zeros(64, np.uint8), np.zeros(64, np.bool_)
codes[[12, 30]], old[[14, 40, 41]] = 1, True
chosen = np.array([3, 4, 5, 6, 9, 11, 12, 13, 14, 15, 16, 40, 41, 62, 63])
hashes = np.zeros(64, np.uint64)
arriving = kernels.Arriving(4096, chosen, hashes, kernels.Target(rows, codes, old))
calls.value = 0
arriving.store(memoryview(bytes(len(chosen) * 4096)))
for one in seen[: calls.value]:
    print(one.advice, (one.start - rows.ctypes.data) // 4096, one.size // 4096)
"""
_POPULATE_WRITE = 23  # <asm-generic/mman-common.h>


def test_the_kernel_is_asked_for_neighbours_that_were_never_written_in_one_piece(tmp_path: Path) -> None:
    """Not for what was written or has old content, and a single page is left to its fault."""
    library = debkit.compile_c(tmp_path / "madvise.so", MADVISE, "-shared", "-fPIC")
    done = subprocess.run(
        [sys.executable, "-c", ASKS],
        env=os.environ | {"LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()},
        capture_output=True,
        text=True,
        check=True,
    )
    asked = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert asked == [(_POPULATE_WRITE, 3, 4), (_POPULATE_WRITE, 15, 2), (_POPULATE_WRITE, 62, 2)]


def test_pages_are_provided_where_they_are_stored_and_nowhere_else() -> None:
    memory = DeviceMemory("m", 1 << 20)
    chosen = np.array([3, 4, 5, 6, 9, 200, 201], dtype=np.intp)
    old = np.zeros(memory.page_count, dtype=np.bool_)
    hashes = np.zeros(memory.page_count, dtype=np.uint64)
    arriving = kernels.Arriving(4096, chosen, hashes, Target(memory.rows, memory.pages.codes, old))
    arriving.store(memoryview(payload_of(1, len(chosen), 4096)).cast("B"))
    assert np.concatenate(list(memory.allocated_pages())).tolist() == chosen.tolist()
    assert np.flatnonzero(memory.pages.codes).tolist() == chosen.tolist()


def test_what_a_client_writes_meanwhile_is_stored_and_hashed_alike() -> None:
    """The hash is that of what lies in memory, whatever happens to its source: each byte is read once."""
    size, count = 4096, 64
    rows = aligned((count, size), 0)
    target = Target(rows, np.zeros(count, np.uint8), np.ones(count, np.bool_))
    page_hashes, indices = np.zeros(count, np.uint64), np.arange(count)
    shared = np.zeros(count * size, dtype=np.uint8)
    ending, seen = threading.Event(), set()

    def scribble() -> None:
        value = 0
        while not ending.is_set():
            value = (value + 1) % 256
            shared[:] = value

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        while len(seen) < 100:
            arriving = kernels.Arriving(size, indices, page_hashes, target)
            arriving.store(memoryview(shared))
            assert np.array_equal(arriving.hashes, kernels.hash_pages(rows, indices))
            seen.add(arriving.hashes.tobytes())
    finally:
        ending.set()
        writer.join()
