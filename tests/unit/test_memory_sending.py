"""Records on their way out: C hands out what the twin in Python does, in any reads, and notes the same."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import hypothesis.strategies as st
import numpy as np
import numpykit
import pytest
from hypothesis import given

from vfu_dev.memory import DeviceMemory, Fingerprints, kernels, sending
from vfu_dev.memory.pages import CODE_DIRTY, Codes
from vfu_dev.memory.sending import SENT_CODE, Record, Reply, plain_record

PAGES = 64
HEADER = b"a header of some bytes."
SIZES = st.sampled_from([64, 256, 4096])
LISTS = st.sets(st.integers(0, PAGES - 1)).map(sorted)
# How much each read has room for, whether it is a copy, and which byte of the memory is written after it.
READS = st.lists(st.tuples(st.integers(1, 30_000), st.booleans(), st.integers(0, 1 << 18)), min_size=1)


class Sent:
    """A memory, and a record of it that one of the two modules hands out."""

    def __init__(self, module: ModuleType, size: int, key: kernels.Key | None = None) -> None:
        self.module = module
        self.rows = np.random.default_rng(1).integers(0, 256, (PAGES, size), dtype=np.uint8)
        self.codes: Codes = np.full(PAGES, CODE_DIRTY, dtype=np.uint8)
        self.hashes = np.zeros(PAGES, dtype=np.uint64)
        self.prints: Fingerprints | None = None
        if key is not None:
            self.prints = Fingerprints(DeviceMemory("m", PAGES * size, size, mapped=True))
            self.prints.key = key
        self.record = Record(self.rows, self.codes, self.hashes, self.prints)
        self.reply = Reply()

    def begin(self, taken: list[int], seed: int = 7) -> None:
        """Begin the record of these pages."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sending, "begin", self.module.begin)
            self.record.begin(HEADER, np.array(taken, dtype=np.intp), seed)

    def read(self, room: int, *, copied: bool, fd: int = -1) -> bytes:
        """Return the next bytes, one way or the other."""
        self.reply.begin()
        out = np.zeros(room + 8, dtype=np.uint8)
        if copied:
            stored = self.module.send(self.record, self.reply, room, kernels.address(out), fd)
        else:
            stored = self.module.send(self.record, self.reply, room)
            if not stored and self.module is sending:
                self.reply.grow(room)
                stored = self.module.send(self.record, self.reply, room)
            assert kernels.join_vectors(self.reply.vectors, out.data) == stored
        assert not out[stored:].any()
        return out[:stored].tobytes()

    def after(self) -> tuple[list[int], ...]:
        """Return what is noted of pages, and what is left."""
        prints = [] if self.prints is None else self.prints.sent.tolist()
        return self.codes.tolist(), self.hashes.tolist(), self.record.pending.tolist(), prints


@contextmanager
def one_page(size_bytes: int) -> Iterator[int]:
    """Yield the address of `size_bytes` that lie in one page of memory, again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] + [ctypes.c_int] * 3, ctypes.c_long]
    step, fixed = mmap.PAGESIZE, 0x10  # MAP_FIXED
    fd = os.memfd_create("window")
    os.ftruncate(fd, step)
    place = mmap.mmap(-1, -(-size_bytes // step) * step)
    start = ctypes.addressof(ctypes.c_char.from_buffer(place))
    access = mmap.PROT_READ | mmap.PROT_WRITE
    for at in range(start, start + len(place), step):
        assert libc.mmap(at, step, access, mmap.MAP_SHARED | fixed, fd, 0) == at
    os.close(fd)
    try:
        yield start
    finally:
        place.close()


@given(SIZES, st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=3), READS, st.booleans())
def test_any_reads_get_what_the_twin_hands_out(
    size: int, records: list[tuple[list[int], list[int]]], reads: list[tuple[int, bool, int]], mapped: bool
) -> None:
    """Also when pages are written, and are to be sent again, between two reads."""
    key = kernels.random_key(size) if mapped else None
    both = [Sent(module, size, key) for module in (sending, numpykit)]
    turn = 0
    for taken, again in records:
        for one in both:
            one.begin(taken, seed=2**64 - 1 - turn)
        total = len(HEADER) + len(taken) * (sending.INDEX_BYTES + size) + sending.CHECKSUM_BYTES
        stored = 0
        while stored < total:
            room, copied, place = reads[turn % len(reads)]
            turn += 1
            ours, theirs = (one.read(room, copied=copied) for one in both)
            assert ours == theirs
            assert len(ours) == min(room, total - stored)
            assert both[0].after() == both[1].after()
            stored += len(ours)
            for one in both:
                one.rows.reshape(-1)[place % one.rows.size] ^= 0x55
                one.codes[place % one.rows.size // size] = CODE_DIRTY
                one.record.send_again(np.array(again, dtype=np.intp))
        assert bytes(both[0].record.checksum) == bytes(both[1].record.checksum)
        assert (both[0].read(9, copied=True), both[0].read(9, copied=False)) == (b"", b"")


@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(1, 90), min_size=1))
def test_a_record_of_bytes_is_handed_out_as_it_is(data: bytes, rooms: list[int]) -> None:
    one = Sent(sending, 64)
    one.record = plain_record()
    one.record.begin_bytes(data)
    found = b""
    while len(found) < len(data):
        room = rooms[len(found) % len(rooms)]
        found += one.read(room, copied=bool(room % 2))
    assert found == data


def test_vectors_refer_to_memory_neighbours_in_one_piece_and_small_scattered_pages_are_joined() -> None:
    one = Sent(sending, 4096)
    one.begin([3, 4, 5, 9, 20])
    data = one.read(1 << 20, copied=False)
    base = kernels.address(one.rows)
    assert one.reply.vectors[1:-1].tolist() == [
        [base + 3 * 4096, 3 * 4096],
        [base + 9 * 4096, 4096],
        [base + 20 * 4096, 4096],
    ]
    small = Sent(sending, 256)
    small.begin([3, 5, 9, 20])
    data = small.read(1 << 20, copied=False)
    assert len(small.reply.vectors) == 3
    assert small.rows[[3, 5, 9, 20]].tobytes() in data


def test_what_is_sent_of_a_memory_that_a_guest_writes_to_are_copies() -> None:
    one = Sent(sending, 4096, kernels.random_key(4096))
    one.begin([3, 4, 9])
    one.read(1 << 20, copied=False)
    sent = one.rows[[3, 4, 9]].tobytes()
    one.rows[:] = 0
    out = bytearray(1 << 20)
    kernels.join_vectors(one.reply.vectors, memoryview(out))
    assert sent in out


def test_a_reply_that_grows_keeps_the_copies_that_it_has_until_the_next_one() -> None:
    one = Sent(sending, 4096, kernels.random_key(4096))
    one.begin([3, 4, 9])
    first = len(HEADER) + 3 * sending.INDEX_BYTES + 2 * 4096
    one.reply.grow(first)
    assert sending.send(one.record, one.reply, first) == first
    pool = weakref.ref(one.reply.pool)
    one.reply.grow(1 << 20)
    count = first + sending.send(one.record, one.reply, 1 << 20)
    assert pool() is not None
    out = bytearray(count)
    assert kernels.join_vectors(one.reply.vectors, memoryview(out)) == count
    assert one.rows[[3, 4, 9]].tobytes() in out
    one.reply.begin()
    assert pool() is None


def test_a_reply_with_too_few_vectors_hands_out_nothing() -> None:
    one = Sent(sending, 4096)
    one.begin(list(range(0, PAGES, 2)))
    one.reply.grow(0)
    assert sending.send(one.record, one.reply, 1 << 20) == 0
    assert len(one.reply.vectors) == 0
    assert len(one.record.pending) == PAGES // 2


def test_copies_of_a_reply_lie_one_behind_the_other_until_it_has_no_room() -> None:
    size = 65536
    one = Sent(sending, size, kernels.random_key(size))
    one.begin(list(range(PAGES)))
    first = len(HEADER) + PAGES * sending.INDEX_BYTES
    one.reply.grow(16 * size)
    rooms = [first + 4 * size, 8 * size, 8 * size]
    assert [sending.send(one.record, one.reply, room) for room in rooms] == [*rooms[:2], 0]
    assert one.record.pending[0] == 12
    out = bytearray(first + 12 * size)
    assert kernels.join_vectors(one.reply.vectors, memoryview(out)) == len(out)
    assert out[first:] == one.rows[:12].tobytes()


def test_what_is_to_be_sent_again_is_so_of_one_record_alone() -> None:
    one = Sent(sending, 64)
    one.begin([2, 4])
    one.record.send_again(np.array([4]))
    one.read(1 << 10, copied=True)
    assert one.codes[[2, 4]].tolist() == [SENT_CODE, CODE_DIRTY]
    one.begin([4])
    one.read(1 << 10, copied=True)
    assert one.codes[4] == SENT_CODE


def test_a_split_page_is_what_was_hashed_whatever_is_written_before_its_rest_is_read() -> None:
    one = Sent(sending, 256)
    one.begin([2, 4])
    before = one.rows[2].tobytes()
    first = one.read(len(HEADER) + 8 + 100, copied=False)
    one.rows[2] = 0
    one.rows[4] = 1
    rest = one.read(1 << 20, copied=False)
    assert first[-100:] + rest[:156] == before
    assert rest[156:-8] == bytes([1]) * 256
    assert one.hashes[2] == numpykit._hash(np.frombuffer(before, np.uint8)[None])[0]
    assert one.codes[2] == one.codes[4] == SENT_CODE


@pytest.mark.parametrize("bad", [[-1], [0, PAGES], [3, 1 << 40]])
@pytest.mark.parametrize("module", [sending, numpykit])
def test_a_page_that_is_not_there_is_refused(module: ModuleType, bad: list[int]) -> None:
    one = Sent(module, 64)
    with pytest.raises(IndexError):
        one.begin(bad)
    assert one.after()[:2] == ([CODE_DIRTY] * PAGES, [0] * PAGES)


def test_a_record_goes_on_after_one_that_is_refused() -> None:
    """Its bytes are still those that it had: nothing of it was freed."""
    one = Sent(sending, 64)
    one.begin([2, 4, 9])
    first = one.read(40, copied=True)
    with pytest.raises(IndexError):
        one.begin([1, PAGES])
    assert one.record.pending.tolist() == [4, 9]
    whole = first + one.read(1 << 20, copied=True)
    assert whole[: len(HEADER) + 12] == HEADER + np.array([2, 4, 9], "<u4").tobytes()
    assert whole[len(HEADER) + 12 : -8] == one.rows[[2, 4, 9]].tobytes()
    assert whole[-8:] == bytes(one.record.checksum)


@pytest.mark.parametrize("mapped", [False, True])
def test_hashes_are_those_of_the_memory_where_a_copy_does_not_read_back(mapped: bool) -> None:
    """The window's pages are all one page, so that each store there undoes the one before."""
    size = 65536
    one = Sent(sending, size, kernels.random_key(size) if mapped else None)
    one.begin([3, 7])
    room = len(HEADER) + 2 * (sending.INDEX_BYTES + size) + sending.CHECKSUM_BYTES
    with one_page(room) as window:
        assert sending.send(one.record, one.reply, room, window) == room
    wanted = np.zeros(PAGES, dtype=np.uint64)
    wanted[[3, 7]] = numpykit._hash(one.rows[[3, 7]])
    assert (one.hashes == wanted).all()
    if one.prints is not None:
        sent = np.zeros_like(one.prints.sent)
        sent[[3, 7]] = numpykit.fingerprints_of(one.rows[[3, 7]], one.prints.key)
        assert (one.prints.sent == sent).all()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_who_waits_ends_a_copy_early_but_not_before_its_first_pages(waiting: bool, mapped: bool) -> None:
    key = kernels.random_key(65536) if mapped else None
    one, other = Sent(sending, 65536, key), Sent(sending, 65536, key)
    for sent in (one, other):
        sent.begin(list(range(PAGES)))
    whole = other.read(8 << 20, copied=True)
    reader, writer = os.pipe()
    try:
        if waiting:
            os.write(writer, b"!")
        data = one.read(8 << 20, copied=True, fd=reader)
    finally:
        os.close(reader)
        os.close(writer)
    assert whole.startswith(data)
    assert (65536 < len(data) < len(whole)) if waiting else data == whole
    assert one.read(8 << 20, copied=False) == whole[len(data) :]
    assert one.after() == other.after()
