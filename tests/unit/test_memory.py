"""Device memory and its page map: what is marked is what is collected; what is gathered is what was there."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from vfu_dev.errors import ConfigError
from vfu_dev.memory import (
    DeviceMemory,
    PageMap,
    fold_hashes,
    gather,
    hash_pages,
    scatter,
    zero_pages,
)
from vfu_dev.memory.pages import CODE_DATA, CODE_ZERO

PAGE = 64


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 300)), max_size=30))
def test_collect_returns_exactly_the_pages_marked(writes: list[tuple[int, int]]) -> None:
    pages = PageMap(1000 * PAGE // PAGE, PAGE)
    expected = set()
    for page, length in writes:
        offset = min(page * PAGE + length % PAGE, 1000 * PAGE - length)
        pages.mark(offset, length)
        expected |= {byte // PAGE for byte in range(offset, offset + length)}
    assert pages.collect().tolist() == sorted(expected)
    assert pages.dirty_pages == pages.written_pages == len(expected)


@given(st.lists(st.integers(0, 99), max_size=50), st.lists(st.integers(0, 99), max_size=50))
def test_claimed_pages_are_clean_until_they_are_written_again(first: list[int], second: list[int]) -> None:
    pages = PageMap(100, PAGE)
    pages.mark_pages(np.array(first, dtype=np.intp))
    pages.claim(pages.collect())
    assert len(pages.collect()) == 0
    pages.mark_pages(np.array(second, dtype=np.intp))
    assert pages.collect().tolist() == sorted(set(second))
    pages.rearm()
    assert pages.collect().tolist() == sorted(set(first) | set(second))
    pages.forget()
    assert pages.written_pages == 0


@given(st.lists(st.integers(0, 29), unique=True, max_size=30), st.integers(0, 2**32))
def test_zero_pages_are_found_wherever_the_one_byte_hides(chosen: list[int], seed: int) -> None:
    memory = DeviceMemory("m", 30 * PAGE, PAGE)
    rng = np.random.default_rng(seed)
    for page in chosen:
        memory.raw[page * PAGE + int(rng.integers(PAGE))] = int(rng.integers(1, 256))
    indices = rng.permutation(30).astype(np.intp)
    assert zero_pages(memory.words, indices).tolist() == [i not in chosen for i in indices.tolist()]


def test_what_is_gathered_can_be_scattered() -> None:
    rng = np.random.default_rng(3)
    source, target = DeviceMemory("a", 50 * PAGE, PAGE), DeviceMemory("b", 50 * PAGE, PAGE)
    source.data[:] = rng.integers(0, 256, 50 * PAGE, dtype=np.uint8)
    indices = rng.permutation(50)[:20].astype(np.intp)
    payload = gather(source.rows, indices, np.empty((30, PAGE), np.uint8))
    scatter(target.rows, indices, payload)
    assert (target.rows[indices] == source.rows[indices]).all()
    assert hash_pages(source.raw, PAGE, indices).tolist() == hash_pages(target.raw, PAGE, indices).tolist()


def test_scatter_outside_the_memory_stores_nothing() -> None:
    memory = DeviceMemory("m", 4 * PAGE, PAGE)
    with pytest.raises(IndexError):
        scatter(memory.rows, np.array([0, 4]), np.ones((2, PAGE), np.uint8))
    assert not memory.data.any()


def test_clear_gives_memory_back() -> None:
    """A cleared memory is zero, unwritten, and holds no backing store."""
    memory = DeviceMemory("m", 1 << 20)
    memory.store(5000, b"x" * 10000)
    assert memory.written_bytes == 3 * 4096
    assert [pages.tolist() for pages in memory.allocated_pages()] == [[1, 2, 3]]
    memory.clear()
    assert not memory.data.any()
    assert memory.written_bytes == 0


def test_untouched_memory_is_not_allocated_by_looking_for_what_is() -> None:
    memory = DeviceMemory("m", 1 << 30)
    memory.store(1 << 29, b"x")
    assert [pages.tolist() for pages in memory.allocated_pages()] == [[1 << 17]]


def test_classify_tells_data_from_zeros_and_gives_up_on_time() -> None:
    memory = DeviceMemory("m", 100 * PAGE, PAGE)
    memory.pages.mark(0, 100 * PAGE)
    memory.raw[PAGE + 63] = 1
    assert memory.classify()
    assert memory.pages.with_code(CODE_DATA).tolist() == [1]
    memory.pages.mark(0, 100 * PAGE)
    assert not memory.classify(budget_seconds=-1)
    assert len(memory.pages.with_code(CODE_DATA)) == 100
    assert len(memory.pages.with_code(CODE_ZERO)) == 0


def test_the_digest_depends_on_every_page_and_its_place() -> None:
    hashes = np.arange(10, dtype=np.uint64)
    digests = {fold_hashes(hashes), fold_hashes(hashes[::-1].copy()), fold_hashes(hashes[:9])}
    assert len(digests) == 3
    memory = DeviceMemory("m", PAGE, PAGE)
    assert hash_pages(memory.raw, PAGE, np.array([0])).tolist() == [0]


@pytest.mark.parametrize(
    ("size", "page"), [(0, 4096), (4097, 4096), (4096, 3000), (4096, 32), (-4096, 4096), (1 << 62, 64)]
)
def test_impossible_sizes_are_refused_in_words(size: int, page: int) -> None:
    with pytest.raises(ConfigError, match="memory m: "):
        DeviceMemory("m", size, page)
