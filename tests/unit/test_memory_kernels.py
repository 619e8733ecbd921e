"""The kernels: each does what its numpy twin does, whatever the pages, and touches nothing else."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpykit
import pytest
from hypothesis import given
from numpykit import fingerprints_of

from vfu_dev.builds import BuildError, artifact
from vfu_dev.builds.native import native_dir
from vfu_dev.memory import DeviceMemory, fold_hashes, kernels, sending
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DIRTY

# What runs once more with other kernels, this file but for those tests among it.
TESTS = [Path(__file__).with_name(f"test_memory_{name}.py") for name in ("kernels", "arriving", "sending")]
OTHERS = "not on_a_processor_without and not with_sanitizers and not the_sanitizers_see"
PYTEST = ("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", OTHERS)

PAGES = 40
SIZES = st.sampled_from([64, 128, 256, 4096, 65536])
LISTS = st.lists(st.integers(0, PAGES - 1), max_size=PAGES)


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments`."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def some_pages(seed: int, size: int, count: int = PAGES) -> kernels.Pages:
    """Return pages of data, of zeros, and of zeros but for one byte."""
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 256, (count, size), dtype=np.uint8)
    pages[::3] = 0
    pages[3::6, rng.integers(size)] = 1
    return pages


def both(name: str, *arguments: Any) -> tuple[Any, Any]:
    """Call a kernel and its twin with copies of the same arrays; return results with the arrays after it."""
    results = []
    for module in (kernels, numpykit):
        copies = [one.copy() if isinstance(one, np.ndarray) else one for one in arguments]
        found = getattr(module, name)(*copies)
        results.append((found, copies))
    return results[0], results[1]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, tuple | list):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@given(st.integers(0, 2**32), SIZES, LISTS)
def test_hashes_and_zeros_are_those_of_the_twin(seed: int, size: int, chosen: list[int]) -> None:
    pages, indices = some_pages(seed, size), np.array(chosen, dtype=np.intp)
    for name in ("hash_pages", "zero_pages"):
        assert same(*both(name, pages, indices))


@given(st.integers(0, 2**32), SIZES, st.integers(0, 63))
def test_fingerprints_are_those_of_the_twin(seed: int, size: int, bit: int) -> None:
    """To the bit; and those of zeros are zeros."""
    pages, key = some_pages(seed, size), kernels.random_key(size)
    sent = fingerprints_of(pages, key)
    codes = np.full(PAGES, CODE_CLEAN | CODE_DIRTY, dtype=np.uint8)
    assert len(kernels.changed_pages(pages, key, sent, codes, 0, PAGES)[0]) == 0
    sums = np.random.default_rng(seed).integers(0, sent.shape[1], PAGES)
    sent[np.arange(PAGES), sums] ^= np.uint64(1 << bit)
    assert kernels.changed_pages(pages, key, sent, codes, 0, PAGES)[0].tolist() == list(range(PAGES))
    assert pages.any(axis=1).tolist() == fingerprints_of(pages, key).any(axis=1).tolist()


@given(st.integers(0, 2**32), SIZES, LISTS, st.integers(0, PAGES), st.integers(0, PAGES + 5))
def test_changes_are_found_among_clean_pages_alone(
    seed: int, size: int, chosen: list[int], first: int, end: int
) -> None:
    pages, key = some_pages(seed, size), kernels.random_key(size)
    sent = fingerprints_of(pages, key)
    rng = np.random.default_rng(seed)
    for page in chosen:
        pages[page, rng.integers(size)] ^= 1
    codes = rng.choice(np.array([0, CODE_DIRTY, CODE_CLEAN | CODE_DIRTY], np.uint8), PAGES)
    assert same(*both("changed_pages", pages, key, sent, codes, first, end))


@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024, 2048, 4096, 16384])
def test_a_flipped_bit_is_found_wherever_it_is(size: int) -> None:
    """Each bit of a page, of data and of zeros, one at a time."""
    bits = np.arange(size * 8)
    for page in (
        np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8),
        np.zeros(size, np.uint8),
    ):
        key = kernels.random_key(size)
        for some in np.array_split(bits, max(1, len(bits) // 4096)):
            pages = np.tile(page, (len(some), 1))
            sent = fingerprints_of(pages, key)
            codes = np.full(len(some), CODE_CLEAN | CODE_DIRTY, dtype=np.uint8)
            assert len(kernels.changed_pages(pages, key, sent, codes, 0, len(some))[0]) == 0
            pages[np.arange(len(some)), some // 8] ^= (1 << (some % 8)).astype(np.uint8)
            found, looked = kernels.changed_pages(pages, key, sent, codes, 0, len(some))
            assert found.tolist() == list(range(len(some)))
            assert looked == len(some)


def test_changes_that_cancel_in_a_sum_are_found() -> None:
    """A bit that moves from one word to another, two top bits that change at once, words in another order."""
    size, rows = 4096, np.arange(32)
    words = np.random.default_rng(1).integers(0, 1 << 63, (96, size // 8), dtype=np.uint64)
    words[:32] = 0
    words[:32, 8] = 1
    key = kernels.random_key(size)
    sent = fingerprints_of(words.view(np.uint8), key)
    words[rows, 8], words[rows, 16 + 8 * rows] = 0, 1
    words[32 + rows, 8] ^= np.uint64(1 << 63)
    words[32 + rows, 16 + 8 * rows] ^= np.uint64(1 << 63)
    words[64:] = words[64:, ::-1].copy()
    codes = np.full(len(words), CODE_CLEAN | CODE_DIRTY, dtype=np.uint8)
    found, _ = kernels.changed_pages(words.view(np.uint8), key, sent, codes, 0, len(words))
    assert len(found) == len(words)


def test_fingerprints_of_the_same_content_differ_with_the_key() -> None:
    pages = some_pages(1, 4096)
    pages = pages[pages.any(axis=1)]
    one, other = (fingerprints_of(pages, kernels.random_key(4096)) for _ in range(2))
    assert not (one == other).any()


@pytest.mark.parametrize("bad", [[-1], [0, PAGES], [3, 1 << 40]])
@pytest.mark.parametrize("module", [kernels, numpykit])
def test_a_page_that_is_not_there_is_refused_and_nothing_is_touched(module: Any, bad: list[int]) -> None:
    pages, indices = some_pages(1, 64), np.array(bad, dtype=np.intp)
    before = pages.copy()
    calls: list[Callable[[], object]] = [
        lambda: module.hash_pages(pages, indices),
        lambda: module.zero_pages(pages, indices),
    ]
    for call in calls:
        with pytest.raises(IndexError):
            call()
    assert (pages == before).all()


@given(st.lists(st.binary(max_size=300), max_size=9))
def test_vectors_are_copied_one_behind_the_other(parts: list[bytes]) -> None:
    vectors = np.concatenate([np.empty((0, 2), np.uint64), *map(kernels.bytes_vector, parts)])
    out = bytearray(len(b"".join(parts)) + 8)
    assert kernels.join_vectors(vectors, memoryview(out)) == len(out) - 8
    assert out == b"".join(parts) + bytes(8)


def test_a_page_of_zeros_has_the_hash_of_one_never_touched() -> None:
    """So that the hashes of a memory that nobody touched are zeros, and its digest needs no memory."""
    memory = DeviceMemory("m", 4 << 20)
    assert kernels.hash_pages(memory.rows, np.arange(memory.page_count)).any() == 0
    hashes = np.arange(10, dtype=np.uint64)
    digests = {fold_hashes(hashes), fold_hashes(hashes[::-1].copy()), fold_hashes(hashes[:9])}
    assert len(digests) == 3


def test_kernels_that_are_none_are_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "libvfu-kernels.so"
    file.write_bytes(b"no library")
    script = "from vfu_dev.memory import kernels; kernels.open_kernels()"
    done = run("-c", script, environment=os.environ | {"VFU_DEV_KERNELS": str(file)})
    assert done.returncode == 1
    assert f"the kernels at {file} cannot be used" in done.stderr
    assert "run: vfu-dev build vfu-kernels" in done.stderr


@pytest.mark.parametrize("more", [(), ("-U__SSE2__",)], ids=["avx2", "sse2"])
def test_the_kernels_pass_on_a_processor_without(more: tuple[str, ...], tmp_path: Path) -> None:
    """And the tests above would have noticed another result: each of them has a twin."""
    library = tmp_path / "libvfu-kernels.so"
    sources = sorted((native_dir() / "kernels").glob("*.c"))
    flags = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-DVFU_NO_AVX2", *more]
    subprocess.run(["cc", *flags, "-o", library, *sources], check=True)
    symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    assert "changed_pages_any" in symbols
    assert "store_any" in symbols
    assert "avx2" not in symbols
    done = run("-m", *PYTEST, *map(str, TESTS), environment=os.environ | {"VFU_DEV_KERNELS": str(library)})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("source", "name", "struct"),
    [
        ("send.c", "record", sending._RecordStruct),
        ("send.c", "reply", sending._ReplyStruct),
        ("store.c", "arriving", kernels._ArrivingStruct),
    ],
)
def test_c_and_python_have_the_same_layout(
    source: str, name: str, struct: type[ctypes.Structure], tmp_path: Path
) -> None:
    """Each member's name, place and size, as the compiler has them; and no member is missing."""
    fields = [field[0] for field in struct._fields_]
    members = "".join(
        f'printf("%zu %zu\\n", offsetof(struct {name}, {field}), sizeof(((struct {name} *)0)->{field}));'
        for field in fields
    )
    probe, program = tmp_path / "probe.c", tmp_path / "probe"
    probe.write_text(
        f'#include <stdio.h>\n#include "{source}"\n'
        f'int main(void) {{ {members} printf("%zu\\n", sizeof(struct {name})); }}\n'
    )
    folder = native_dir() / "kernels"
    flags = ["-std=gnu11", "-DVFU_NO_AVX2", "-I", folder]
    subprocess.run(["cc", *flags, "-o", program, probe, folder / "kernels.c"], check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [getattr(struct, field) for field in fields]
    assert found == [*(f"{one.offset} {one.size}" for one in ours), str(ctypes.sizeof(struct))]


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment of a process with ASan and UBSan in the kernels."""
    try:
        library = artifact("vfu-kernels-asan", build=True)
    except BuildError as error:
        pytest.skip(str(error))
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return os.environ | {
        "VFU_DEV_KERNELS": str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0,abort_on_error=0",
        "PYTHONMALLOC": "malloc",
    }


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_the_kernels_pass_with_sanitizers(file: Path, sanitized: dict[str, str]) -> None:
    """With ASan and UBSan, which end what reads too far."""
    done = run("-m", *PYTEST, str(file), environment=sanitized)
    assert done.returncode == 0, done.stdout + done.stderr


SHORT = (
    "import numpy as np; from vfu_dev.memory import kernels, sending; "
    "rows = np.zeros((1, 64), np.uint8); short = np.lib.stride_tricks.as_strided(rows, (2, 64)); "
)


@pytest.mark.parametrize(
    "script",
    [
        "kernels.hash_pages(short, np.array([1]))",
        "kernels.Arriving(64, np.array([0]), np.zeros(1, np.uint64), None).store(memoryview(short[1]))",
        "rows = np.ones((9, 64), np.uint8); reply = sending.Reply(); reply.grow(4096); "
        "record = sending.Record(rows, np.zeros(9, np.uint8), np.zeros(1, np.uint64)); "
        "record.begin(b'h', np.arange(9), 1); sending.send(record, reply, 4096)",
    ],
    ids=["hashed", "stored", "sent"],
)
def test_the_sanitizers_see_what_is_behind_an_array(script: str, sanitized: dict[str, str]) -> None:
    """A page that is read, or a hash that is stored, behind the last one: they would see it in the tests."""
    assert "heap-buffer-overflow" in run("-c", SHORT + script, environment=sanitized).stderr
