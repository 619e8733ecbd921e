"""Device memory and its page map: what is marked is what is collected, and store is given back."""

from __future__ import annotations

import gc
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from vfu_dev.errors import ConfigError
from vfu_dev.memory import DeviceMemory, PageMap, device_memory
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DATA, CODE_DIRTY, CODE_NEVER, CODE_ZERO

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
    gc.collect()
    memory = DeviceMemory("m", 1 << 30)
    before = kept(memory)["Rss"]
    memory.store(1 << 29, b"x")
    assert np.concatenate(list(memory.allocated_pages())).tolist() == [1 << 17]
    assert kept(memory)["Rss"] - before == 4 << 10


@pytest.mark.parametrize("way", ["memfd", "pagemap scan", "pagemap"])
@pytest.mark.parametrize("page", [64, 4096, 16384, 4 << 20])
def test_backing_store_is_found_in_pages_of_any_size(
    page: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a kernel before 6.7, which has no PAGEMAP_SCAN; by that, a page only read is not among them."""
    monkeypatch.setattr(device_memory, "_SCAN_BYTES", 1 << 20)
    monkeypatch.setattr(device_memory, "_SCAN_REGIONS", 2)
    if way == "pagemap":
        monkeypatch.setattr(device_memory, "_PAGEMAP_SCAN", 0)
    memory = DeviceMemory("m", 8 << 20, page, mapped=way == "memfd")
    assert way != "pagemap scan" or memory.raw[6 << 20] == 0
    written = (5000, 20000, 40000, 60000, (4 << 20) - 1, (8 << 20) - 1)
    for offset in written:
        memory.raw[offset] = 1
    least = max(page, 4096)  # the kernel has no smaller ones
    expected = {
        number
        for offset in written
        for number in range(offset // least * least // page, (offset // least + 1) * least // page)
    }
    assert np.concatenate(list(memory.allocated_pages())).tolist() == sorted(expected)  # each once


@pytest.mark.parametrize("there", [False, True])
def test_a_kernel_that_does_not_tell_costs_time_only(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /proc, or with a pagemap that is empty, all pages count, and to read them allocates none."""
    pagemap = tmp_path / "pagemap"
    if there:
        pagemap.touch()
    monkeypatch.setattr(device_memory, "_PAGEMAP", str(pagemap))
    gc.collect()
    memory = DeviceMemory("m", 1 << 20)
    before = kept(memory)["Rss"]
    memory.store(4096, b"x")
    assert np.concatenate(list(memory.allocated_pages())).tolist() == list(range(256))
    assert memory.data.sum() == ord("x")
    assert kept(memory)["Rss"] - before == 4 << 10


def kept(memory: DeviceMemory) -> dict[str, int]:
    """Return what the kernel says of the mapping of `memory`, in bytes, and see that its flags are right.

    The kernel joins mappings side by side: other memories of the process may be in it, so only changes count.
    """
    where, found, inside = memory.data.__array_interface__["data"][0], {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *fields = line.split()
        if not key.endswith(":"):
            start, end = (int(place, 16) for place in key.split("-"))
            inside = start <= where < end
        elif inside and fields[1:] == ["kB"]:
            found[key[:-1]] = int(fields[0]) << 10
        elif inside and key == "VmFlags:":
            assert "dc" in fields  # no fork has a copy
            assert "nh" in fields or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    return found


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


def test_a_refilled_memory_keeps_its_store_and_knows_what_is_old() -> None:
    """Nothing counts as written, and what had content is named, marked or not."""
    memory = DeviceMemory("m", 1 << 20)
    memory.store(5000, b"x" * 10000)
    memory.raw[100 * 4096] = 1  # by somebody who marks nothing
    old = memory.begin_refill()
    assert np.flatnonzero(old).tolist() == [1, 2, 3, 100]
    assert memory.pages.written_pages == 0
    assert np.concatenate(list(memory.allocated_pages())).tolist() == [1, 2, 3, 100]
    memory.clear_pages(np.array([1, 2, 100]))
    assert np.concatenate(list(memory.allocated_pages())).tolist() == [3]
    assert not memory.rows[[1, 2, 100]].any()
    assert memory.rows[3].any()


def test_old_store_in_too_many_pieces_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_REFILL_SEARCH_SECONDS", -1.0)
    memory = DeviceMemory("m", 1 << 20)
    memory.store(0, b"x" * 4096)
    assert not memory.begin_refill().any()
    assert sum(map(len, memory.allocated_pages())) == 0
    assert not memory.data.any()


@pytest.mark.parametrize(
    ("size", "page"), [(0, 4096), (4097, 4096), (4096, 3000), (4096, 32), (-4096, 4096), (1 << 62, 64)]
)
def test_impossible_sizes_are_refused_in_words(size: int, page: int) -> None:
    with pytest.raises(ConfigError, match="memory m: "):
        DeviceMemory("m", size, page)


def test_a_large_map_says_what_a_small_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """In stretches, some never written; and what was never written is passed over by what changes a map."""
    monkeypatch.setattr("vfu_dev.memory.pages.STRETCH_PAGES", 16)
    monkeypatch.setattr("vfu_dev.memory.pages._EAGER_PAGES", 32)
    large, small = PageMap(90, 4096), PageMap(30, 4096)
    assert isinstance(small.marks, bytearray)
    random = np.random.default_rng(7)
    codes = random.choice([CODE_NEVER, *range(1, 8)], 90).astype(np.uint8)
    codes[codes == CODE_CLEAN] = CODE_NEVER
    codes[16:32] = codes[64:80] = CODE_NEVER
    large.codes[:] = codes
    found = [(where.start, where.stop) for where, _ in large.stretches()]
    assert found == [(0, 16), (32, 48), (48, 64), (80, 90)]
    dirty = (codes != CODE_NEVER) & (codes < CODE_CLEAN)
    assert large.collect().tolist() == np.flatnonzero(dirty).tolist()
    assert large.unclassified().tolist() == np.flatnonzero(codes == CODE_DIRTY).tolist()
    assert large.with_code(CODE_ZERO).tolist() == np.flatnonzero(codes == CODE_ZERO).tolist()
    assert (large.dirty_pages, large.written_pages) == (dirty.sum(), (codes != 0).sum())
    large.found_written(np.array([3, 70, 89]))
    assert [large.take_recent(), large.take_recent()] == [3, 0]
    large.mark(89 * 4096, 8)
    assert large.codes[89] == CODE_DIRTY
    large.rearm()
    assert large.codes[:89].tolist() == (codes & 3)[:89].tolist()
    large.forget()
    assert not large.codes.any()
    assert large.collect().tolist() == []
    assert large.collect().dtype == np.intp
