"""Work on many pages at once, in C: native/kernels, which touches every byte of memory once.

The functions take numpy arrays; the tests compare each with an implementation in numpy. The pages of a memory
are a 2-D array, shape (page_count, page_size_bytes) uint8, and page indices have shape (n,). `sending` calls
native/kernels as well; no other module of this folder does, or uses ctypes.

A page's hash is its xxh3 exclusive-or that of a page of zeros. So a page of zeros has hash 0, and the
hashes of an untouched memory are an untouched array. The same holds for fingerprints, of which a page larger
than MAX_BLOCK_BYTES has one for each block of as much; `vfu_dev.memory.fingerprints` says what they are for.

There is no other way in production: every user of a memory has built the kernels, which takes a second and
needs a C compiler. `VFU_DEV_KERNELS` names a library to use instead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_char_p, c_int, c_size_t, c_uint8, c_uint64, c_void_p
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from vfu_dev.builds import artifact
from vfu_dev.errors import BuildError
from vfu_dev.memory.pages import CODE_CLEAN, CODE_DATA, CODE_NEVER, Codes, PageIndices

Pages = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]
# Of each page, two words for each block of it, shape (page_count, 2 * blocks).
Fingerprints = npt.NDArray[np.uint64]
# The fingerprint of zeros, then random words. One word of a block is multiplied with one word of the key, and
# with the next.
Key = npt.NDArray[np.uint64]
# Addresses and lengths in bytes, shape (n, 2): what one struct iovec is, <sys/uio.h>.
Vectors = npt.NDArray[np.uint64]

MAX_BLOCK_BYTES = 4096

_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "vfu_hash_pages": (
        c_int,
        (c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_uint64, c_void_p),
    ),
    "vfu_zero_pages": (c_int, (c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_void_p)),
    "vfu_prepare_key": (None, (c_void_p, c_size_t)),
    "vfu_changed_pages": (
        c_size_t,
        (
            *(c_void_p, c_size_t, c_void_p, c_void_p),
            *(c_void_p, c_uint8, c_size_t, c_size_t),
            *(c_void_p, c_void_p),
        ),
    ),
    "vfu_store_pages": (c_int, (c_void_p, c_void_p, c_size_t)),
    "vfu_join_vectors": (None, (c_void_p, c_size_t, c_void_p)),
    "vfu_begin_record": (
        c_int,
        (c_void_p, c_char_p, c_size_t, c_void_p, c_void_p, c_size_t, c_uint64),
    ),
    "vfu_send": (c_size_t, (c_void_p, c_void_p, c_void_p, c_size_t, c_int)),
}

_byte_of = ctypes.c_char.from_buffer


@cache
def library() -> Any:
    """Return the kernels. Raises: BuildError: they are missing."""
    path = artifact("vfu-kernels", build=True)
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as err:
        raise BuildError(
            f"the kernels at {path} cannot be used: {err}; run: vfu-dev build vfu-kernels"
        ) from err
    return library


def open_kernels() -> None:
    """Open their library now, rather than when a guest waits. Raises: BuildError: it is missing."""
    library()


def address(array: npt.NDArray[Any]) -> int:
    """Return where the elements of `array` are, which it keeps alive."""
    assert array.flags.c_contiguous
    if array.flags.writeable and array.size:
        return ctypes.addressof(_byte_of(array.data))  # a microsecond less than what numpy offers
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


def bytes_address(data: bytes | memoryview) -> int:
    """Return where the bytes of `data` are."""
    if isinstance(data, memoryview) and not data.readonly and data:
        return ctypes.addressof(_byte_of(data))
    return address(np.frombuffer(data, dtype=np.uint8))


def members(*names: str) -> tuple[tuple[str, type[c_uint64]], ...]:
    """Return the fields of a struct in C whose members, `names`, have 64 bits each."""
    return tuple((name, c_uint64) for name in names)


def page_list(indices: PageIndices) -> PageIndices:
    """Return `indices` as C takes them: 64 bits each, one behind the other."""
    return np.ascontiguousarray(indices, dtype=np.int64)


def outside(status: int) -> None:
    """Raise IndexError for the result of a kernel that says so."""
    if status < 0:
        raise IndexError("a page that is not there")


@lru_cache
def zero_page_xxh3(page_size_bytes: int) -> int:
    """Return the xxh3 of a page of zeros."""
    return xxhash.xxh3_64_intdigest(bytes(page_size_bytes))


def hash_pages(pages: Pages, indices: PageIndices) -> Hashes:
    """Return the hash of each of the pages `indices`, shape (n,). Raises: IndexError: one is not there."""
    chosen, size = page_list(indices), pages.shape[1]
    hashes = np.empty(len(chosen), dtype=np.uint64)
    outside(
        library().vfu_hash_pages(
            address(pages),
            len(pages),
            size,
            address(chosen),
            len(chosen),
            zero_page_xxh3(size),
            address(hashes),
        )
    )
    return hashes


def zero_pages(pages: Pages, indices: PageIndices) -> npt.NDArray[np.bool_]:
    """Return for each of `indices` whether the page is all zeros, shape (n,).

    A page that starts with anything else is settled by its first 64 bytes. Raises: IndexError: no such page.
    """
    chosen = page_list(indices)
    zero = np.empty(len(chosen), dtype=np.bool_)
    outside(
        library().vfu_zero_pages(
            address(pages), len(pages), pages.shape[1], address(chosen), len(chosen), address(zero)
        )
    )
    return zero


def random_key(page_size_bytes: int) -> Key:
    """Return a key for the fingerprints of pages of this size, which nobody else can know."""
    key = np.empty(2 + MAX_BLOCK_BYTES // 8 + 1, dtype=np.uint64)
    key[2:] = np.frombuffer(os.urandom(key[2:].nbytes), dtype=np.uint64)
    library().vfu_prepare_key(address(key), page_size_bytes)
    return key


def changed_pages(
    pages: Pages, key: Key, fingerprints: Fingerprints, codes: npt.NDArray[np.uint8], first: int, end: int
) -> tuple[PageIndices, int]:
    """Compare the clean pages from `first` to before `end` with their `fingerprints`.

    Args: codes: of all pages; those of CODE_CLEAN and above are compared, others are not even read.
    Returns: which differ, shape (n,), ascending; and how many were compared.
    """
    end = min(end, len(codes))
    assert len(pages) == len(fingerprints) == len(codes)
    changed = np.empty(max(0, end - first), dtype=np.int64)
    looked = c_size_t()
    found = library().vfu_changed_pages(
        address(pages),
        pages.shape[1],
        address(key),
        address(fingerprints),
        address(codes),
        CODE_CLEAN,
        first,
        end,
        address(changed),
        ctypes.byref(looked),
    )
    return changed[:found], looked.value


class Target(NamedTuple):
    """Where pages are stored.

    Attributes:
        rows: all pages of the memory.
        codes: theirs, shape (page_count,).
        old: whether what was there before is still there, shape (page_count,).
    """

    rows: Pages
    codes: Codes
    old: npt.NDArray[np.bool_]


class _ArrivingStruct(ctypes.Structure):
    """struct arriving of native/kernels/store.c."""

    _fields_ = members(
        *("base", "page_count", "size", "os_page"),
        *("list", "list_count", "stored"),
        *("hashes", "page_hashes", "zero_hash"),
        *("codes", "old", "code_never", "code_data"),
    )


class Arriving:
    """Pages that arrive in pieces: stored, hashed and noted as they come.

    The kernel provides pages without old content in large steps (MADV_POPULATE_WRITE): else each page of the
    operating system would fault by itself.

    Args:
        page_size_bytes: of each page.
        indices: which pages come, shape (n,), ascending, in this order.
        page_hashes: of all pages of the memory, shape (page_count,): what is stored there is hashed into it.
        target: None for pages that are hashed only.
    """

    def __init__(
        self, page_size_bytes: int, indices: PageIndices, page_hashes: Hashes, target: Target | None
    ) -> None:
        chosen = page_list(indices)
        self._size = page_size_bytes
        self._hashes = np.empty(len(chosen), dtype=np.uint64)
        self._alive = (chosen, page_hashes, target)
        self._struct = _ArrivingStruct(
            page_count=len(page_hashes),
            size=page_size_bytes,
            os_page=mmap.PAGESIZE,
            list=address(chosen),
            list_count=len(chosen),
            hashes=address(self._hashes),
            page_hashes=address(page_hashes),
            zero_hash=zero_page_xxh3(page_size_bytes),
            code_never=CODE_NEVER,
            code_data=CODE_DATA,
        )
        if target is not None:
            assert target.rows.shape == (len(page_hashes), page_size_bytes)
            assert len(target.codes) == len(target.old) == len(page_hashes)
            self._struct.base = address(target.rows)
            self._struct.codes = address(target.codes)
            self._struct.old = address(target.old)
        self._reference = ctypes.addressof(self._struct)

    @property
    def left(self) -> int:
        """How many pages are still to come."""
        return len(self._hashes) - int(self._struct.stored)

    @property
    def hashes(self) -> Hashes:
        """The hashes of the pages that have come, as they were stored, in order."""
        return self._hashes[: self._struct.stored]

    def store(self, data: memoryview) -> None:
        """Take the next pages, one or more of those that are left, whole; `data` may change meanwhile.

        Raises: IndexError: a page is not there, or not expected; nothing was stored.
        """
        count, rest = divmod(len(data), self._size)
        assert not rest
        outside(library().vfu_store_pages(self._reference, bytes_address(data), count))


def bytes_vector(data: bytes | memoryview) -> Vectors:
    """Return where `data` is, shape (1, 2); the caller keeps it alive."""
    return np.array([[bytes_address(data), len(data)]], dtype=np.uint64)


def join_vectors(vectors: Vectors, out: memoryview) -> int:
    """Copy what `vectors` refer to into `out`, one behind the other; return the bytes copied."""
    total = int(vectors[:, 1].sum())
    assert total <= len(out)
    if total:
        library().vfu_join_vectors(address(vectors), len(vectors), bytes_address(out))
    return total


def hash_bytes(hashes: Hashes) -> memoryview:
    """Return what a checksum or a digest covers in the place of pages with these hashes."""
    return hashes.astype("<u8", copy=False).data.cast("B")


def fold_hashes(hashes: Hashes) -> bytes:
    """Return the 16-byte digest of a memory from the hashes of all its pages, in order."""
    return xxhash.xxh3_128_digest(hash_bytes(hashes))
