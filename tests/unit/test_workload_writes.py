"""Which write comes where: docs/load.md, checked against its arithmetic done one write at a time."""

from __future__ import annotations

import codecs
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_dev.errors import ConfigError
from vfu_dev.workload import Phase, Program, Workload, contents, program, writes_of
from vfu_dev.workload.splitmix import fill_words, outputs
from vfu_dev.workload.writes import MAX_ZIPF_PLACES, HotsetWrites, PlacedWrites, Writes

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
PAGE = 4096
PATTERNS = ("sequential", "uniform", "hotset", "zipf")


def output(seed: int, i: int) -> int:
    """Output i of splitmix64, as docs/load.md writes it."""
    z = (seed + (i + 1) * GOLDEN) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def below(x: int, bound: int) -> int:
    return ((x >> 32) * bound) >> 32


def fraction(x: int) -> float:
    return (x >> 11) * 2.0**-53


def offset_of(spec: Workload, memory_bytes: int, page_bytes: int, n: int) -> int:
    """Where write n goes, as docs/load.md writes it."""
    span = -(-spec.write_bytes // page_bytes)
    places = memory_bytes // page_bytes // span
    first = output(spec.seed, 4 * n)
    if spec.pattern == "sequential":
        place = n % places
    elif spec.pattern == "uniform":
        place = below(first, places)
    elif spec.pattern == "hotset":
        hot = max(1, int(places * spec.hot_fraction))
        if hot == places or fraction(output(spec.seed, 4 * n + 1)) < spec.hot_share:
            place = below(first, hot)
        else:
            place = hot + below(first, places - hot)
    else:
        sums, total = [], 0.0
        for k in range(places):
            total += float(k + 1) ** -spec.zipf_exponent
            sums.append(total)
        place = min(places - 1, sum(s <= fraction(first) * total for s in sums))
    slots = page_bytes // spec.write_bytes
    slot = below(output(spec.seed, 4 * n + 2), slots) if slots > 1 else 0
    return place * span * page_bytes + slot * spec.write_bytes


def make(spec: Workload, memory_bytes: int = 64 * PAGE, page_bytes: int = PAGE) -> Writes:
    writes = writes_of(spec, memory_bytes, page_bytes)
    assert writes is not None
    return writes


def chosen(spec: Workload, pages: int, count: int) -> np.ndarray:
    """The pages that the first writes go to."""
    return make(spec, pages * PAGE).offsets(0, count) // PAGE


specs = st.builds(
    Workload,
    pattern=st.sampled_from(PATTERNS),
    rate_pages=st.just(1),
    write_bytes=st.sampled_from([1, 3, 8, 100, 4095, 4096, 4097, 3 * 4096]) | st.integers(1, 20000),
    seed=st.integers(0, MASK),
    hot_fraction=st.floats(0, 1),
    hot_share=st.floats(0, 1),
    zipf_exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)


@given(specs, st.sampled_from([64, 4096, 65536]), st.integers(0, 1 << 40), st.integers(1, 40))
def test_writes_are_what_the_document_defines(spec: Workload, page: int, first: int, count: int) -> None:
    """Every pattern, with every size of a write and of a page, agrees with the arithmetic done by hand."""
    memory = 32 * max(page, spec.pages_per_write(page) * page)
    got = make(spec, memory, page).offsets(first, count).tolist()
    assert got == [offset_of(spec, memory, page, n) for n in range(first, first + count)]


@given(specs, st.integers(0, 1 << 40), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_batches_do_not_matter(spec: Workload, first: int, batches: list[int]) -> None:
    """However a load is cut into batches, the same writes come out."""
    writes = make(spec, 1 << 20)
    whole = writes.offsets(first, sum(batches))
    parts, n = [], first
    for count in batches:
        parts.append(writes.offsets(n, count))
        n += count
    assert np.array_equal(np.concatenate(parts), whole)


@given(specs, st.integers(0, 1 << 40), st.integers(1, 30))
def test_writes_stay_where_they_may(spec: Workload, first: int, count: int) -> None:
    """No write leaves the memory, and one smaller than a page never crosses into the next."""
    memory = 8 * PAGE
    writes = make(spec, memory)
    offsets, lengths = writes.offsets(first, count), writes.lengths(first, count)
    assert (offsets >= 0).all()
    assert (offsets + lengths <= memory).all()
    touched = (offsets + lengths - 1) // PAGE - offsets // PAGE + 1
    assert (touched == spec.pages_per_write()).all()


@given(st.integers(0, MASK), st.integers(0, 1 << 40), st.integers(1, 5), st.integers(1, 100))
def test_contents_are_what_the_document_defines(seed: int, first: int, count: int, size: int) -> None:
    """Word i of write n is its fourth output plus i times the constant, cut where the write ends."""
    for row, n in zip(contents(seed, first, count, size), range(first, first + count), strict=True):
        start = output(seed, 4 * n + 3)
        words = b"".join(((start + i * GOLDEN) & MASK).to_bytes(8, "little") for i in range(-(-size // 8)))
        assert row.tobytes() == words[:size]


@given(st.integers(0, MASK), st.integers(0, MASK // 2))
def test_the_random_numbers_are_those_of_the_first_content(seed: int, first: int) -> None:
    """Patterns and the reference device's first content use the same generator."""
    words = np.empty(9, dtype=np.uint64)
    fill_words(words, seed, first)
    assert np.array_equal(outputs(seed, first, 9), words)


def test_sequential_goes_round() -> None:
    """Every page once, in order, then again."""
    assert chosen(Workload("sequential", rate_pages=1), 10, 25).tolist() == [n % 10 for n in range(25)]


# Fixed seeds, so these cannot flake; the bounds are those a wrong distribution would have to hit by luck:
# six standard deviations of a fair one.
def within(count: int, draws: int, probability: float) -> bool:
    return abs(count - draws * probability) < 6 * math.sqrt(draws * probability * (1 - probability)) + 1


@pytest.mark.parametrize("seed", [1, 2, MASK])
def test_uniform_is_uniform(seed: int) -> None:
    """Each of 100 pages gets its hundredth of the writes, and neighbouring writes have nothing in common."""
    pages = chosen(Workload("uniform", rate_pages=1, seed=seed), 100, 100_000)
    assert all(within(count, 100_000, 0.01) for count in np.bincount(pages, minlength=100))
    assert within(int((pages[1:] == pages[:-1]).sum()), 99_999, 0.01)


@pytest.mark.parametrize(("hot_fraction", "hot_share"), [(0.1, 0.9), (0.5, 0.5), (0.02, 0.3), (0.25, 1.0)])
def test_hot_pages_get_their_share(hot_fraction: float, hot_share: float) -> None:
    """The share goes to that fraction of the pages, evenly; what is left goes evenly to the others."""
    spec = Workload("hotset", rate_pages=1, hot_fraction=hot_fraction, hot_share=hot_share, seed=7)
    counts = np.bincount(chosen(spec, 200, 100_000), minlength=200)
    hot = int(200 * hot_fraction)
    assert within(int(counts[:hot].sum()), 100_000, hot_share)
    assert all(within(count, 100_000, hot_share / hot) for count in counts[:hot])
    assert all(within(count, 100_000, (1 - hot_share) / (200 - hot)) for count in counts[hot:])


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 2.5])
def test_zipf_ranks_get_their_probability(exponent: float) -> None:
    """Each of 50 places gets the share that the law gives it."""
    counts = np.bincount(
        chosen(Workload("zipf", rate_pages=1, zipf_exponent=exponent, seed=3), 50, 200_000), minlength=50
    )
    weights = [(rank + 1) ** -exponent for rank in range(50)]
    assert all(
        within(count, 200_000, weight / sum(weights)) for count, weight in zip(counts, weights, strict=True)
    )


def test_zipf_of_millions_of_places() -> None:
    """A memory of two million pages works; the first page's share is what the harmonic number says."""
    pages = 2_000_000
    got = chosen(Workload("zipf", rate_pages=1, seed=11), pages, 100_000)
    harmonic = math.log(pages) + 0.5772156649
    assert within(int((got == 0).sum()), 100_000, 1 / harmonic)
    assert got.max() > pages // 2
    with pytest.raises(ConfigError, match="places"):
        writes_of(Workload("zipf", rate_pages=1), (MAX_ZIPF_PLACES + 1) * 64, 64)


def test_one_hot_page_at_least() -> None:
    """A fraction of nothing is still one page, and all pages hot is the same as uniform."""
    one = make(Workload("hotset", rate_pages=1, hot_fraction=0.0, hot_share=1.0))
    assert isinstance(one, HotsetWrites)
    assert one.hot == 1
    assert set(one.offsets(0, 100) // PAGE) == {0}
    everything = Workload("hotset", rate_pages=1, hot_fraction=1.0, hot_share=0.0)
    assert np.array_equal(chosen(everything, 64, 100), chosen(Workload("uniform", rate_pages=1), 64, 100))


def test_a_write_of_many_pages() -> None:
    """Places are as far apart as a write is long, and what does not fill one is left out."""
    writes = make(Workload("sequential", rate_pages=1, write_bytes=3 * PAGE), 10 * PAGE)
    assert isinstance(writes, PlacedWrites)
    assert writes.places == 3
    assert writes.offsets(0, 4).tolist() == [0, 3 * PAGE, 6 * PAGE, 0]
    with pytest.raises(ConfigError, match="does not fit"):
        writes_of(Workload("uniform", rate_pages=1, write_bytes=PAGE + 1), PAGE)


@pytest.mark.parametrize("byte_order_mark", [b"", codecs.BOM_UTF8])
def test_a_trace_is_followed(tmp_path: Path, byte_order_mark: bytes) -> None:
    """Rows come in order, again and again; rows without bytes write nothing."""
    path = tmp_path / "a.csv"
    text = "time,offset,length\n0,0x1000,8\n0.5,0,4096\n0.75,12,1\n1,0,0\n"
    path.write_bytes(byte_order_mark + text.encode())
    writes = make(Workload("trace", trace=str(path)))
    assert writes.write_bytes is None
    assert writes.offsets(2, 5).tolist() == [12, 4096, 0, 12, 4096]
    assert writes.lengths(2, 5).tolist() == [1, 8, 4096, 1, 8]
    with pytest.raises(ConfigError, match="write 0 ends at 4104, the memory at 4096"):
        writes_of(Workload("trace", trace=str(path)), PAGE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "first line"),
        ("time,length,offset\n1,1,1\n", "first line"),
        ("time,offset,length\n", "needs a write"),
        ("time,offset,length\n0,0,8\n", "later than 0"),
        ("time,offset,length\n1,0,0\n", "needs a write"),
        ("time,offset,length\n2,0,8\n1,0,8\n", "line 3: the time falls"),
        ("time,offset,length\n1,0,8\nnan,0,8\n", "line 3"),
        ("time,offset,length\n1,-1,8\n", "line 2"),
        ("time,offset,length\n1,0,1048577\n", "line 2"),
        ("time,offset,length\n1,0\n", "line 2"),
        ("time,offset,length\n1,0,8,9\n", "line 2"),
        ("time,offset,length\n1,0,\u00e9\n", "cannot be read"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    """Whatever is wrong with a file is said with its line."""
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason):
        writes_of(Workload("trace", trace=str(path)), 1 << 20)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would have its reader wait, a device might never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(ConfigError, match=r"not a file|cannot be read"):
            writes_of(Workload("trace", trace=str(path)), 1 << 20)


def test_all_phases_together_have_limits(tmp_path: Path) -> None:
    """What one phase may take, a thousand may not."""
    zipf = Workload("phases", phases=tuple(Phase(1, Workload("zipf", rate_pages=1)) for _ in range(17)))
    with pytest.raises(ConfigError, match="all phases"):
        Program(zipf, 1 << 32)
    rows = "".join(f"{n},0,1\n" for n in range(1000))
    paths = [tmp_path / f"{n}.csv" for n in range(3)]
    for path in paths:
        path.write_text(f"time,offset,length\n{rows}")
    many = Workload("phases", phases=tuple(Phase(1, Workload("trace", trace=str(path))) for path in paths))
    assert len(Program(many, 4096).writes) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "MAX_ROWS", 2999)
        with pytest.raises(ConfigError, match="more than 2999 rows"):
            Program(many, 4096)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    """The error names the file."""
    with pytest.raises(ConfigError, match="absent"):
        writes_of(Workload("trace", trace=str(tmp_path / "absent.csv")), 1 << 20)
