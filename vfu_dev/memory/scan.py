"""Vectorised work on many pages at once.

All functions take the pages of a memory as a 2-D array, shape (page_count, page_size_bytes) uint8 or
(page_count, page_size_bytes / 8) uint64, and page indices, shape (n,). Figures are from the project's machine
(2 cores), 64 MiB of 4 KiB pages in random order, best of three.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

from vfu_dev.memory.pages import PageIndices

# Work is cut so that what one step reads is still in the cache when the next one wants it: 256 KiB fits every
# L2.
CHUNK_BYTES = 256 * 1024


def zero_pages(words: npt.NDArray[np.uint64], indices: PageIndices) -> npt.NDArray[np.bool_]:
    """Say for each of `indices` whether the page is all zeros; shape (n,).

    A page that starts with anything else is settled by one word (a 64 MiB memory in 0.15 ms); only the rest
    is read whole, or-reduced in cache-sized chunks: 27 GB/s in order, 10 GB/s scattered, where comparing page
    by page in Python reached 1.3 GB/s.
    """
    zero: npt.NDArray[np.bool_] = words[indices, 0] == 0
    candidates = np.flatnonzero(zero)
    step = max(1, CHUNK_BYTES // (words.shape[1] * 8))
    for start in range(0, len(candidates), step):
        chosen = candidates[start : start + step]
        pages = indices[chosen]
        if pages[-1] - pages[0] == len(pages) - 1 and (np.diff(pages) == 1).all():
            chunk = words[pages[0] : pages[-1] + 1]  # a view: nothing is copied
        else:
            chunk = words[pages]
        zero[chosen] = np.bitwise_or.reduce(chunk, axis=1) == 0
    return zero


def gather(
    pages: npt.NDArray[np.uint8], indices: PageIndices, out: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Copy the pages `indices` into the first rows of `out` and return those rows.

    `take` with mode="clip" is 14 GB/s; fancy indexing reaches 2 and mode="raise" buffers everything twice.
    Clipping hides nothing: indices come from the page map.
    """
    rows = out[: len(indices)]
    np.take(pages, indices, axis=0, out=rows, mode="clip")
    return rows


def scatter(pages: npt.NDArray[np.uint8], indices: PageIndices, payload: npt.NDArray[np.uint8]) -> None:
    """Store the rows of `payload`, shape (n, page_size_bytes), as the pages `indices` (23 GB/s).

    Raises:  IndexError: an index outside the memory; numpy checks all of them before it stores the first.
    """
    pages[indices] = payload


def hash_pages(raw: memoryview, page_size_bytes: int, indices: PageIndices) -> npt.NDArray[np.uint64]:
    """Return the hash of each of the pages `indices` of `raw`, shape (n,); 190 ns a page, 21 GB/s.

    A page's hash is its xxh3 exclusive-or that of a page of zeros. So a page of zeros has hash 0, and the
    hashes of a memory that nobody touched are an array that nobody touched either.
    """
    digest = xxhash.xxh3_64_intdigest
    size = page_size_bytes
    hashes = np.array([digest(raw[i * size : (i + 1) * size]) for i in indices.tolist()], dtype=np.uint64)
    hashes ^= _zero_page_xxh3(page_size_bytes)
    return hashes


@lru_cache
def _zero_page_xxh3(page_size_bytes: int) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(bytes(page_size_bytes)))


def fold_hashes(hashes: npt.NDArray[np.uint64]) -> bytes:
    """Return the 16-byte digest of a memory from the hashes of all its pages, in order."""
    return xxhash.xxh3_128_digest(hashes.astype("<u8", copy=False).data.cast("B"))
