"""Regions as they are set up, and the way into each while it is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vfu_dev.libvfio_user import _ffi

RegionHandler = _ffi.RegionHandler

_COUNTS_BEFORE_BUCKETS = 3  # VFU_REGION_COUNTS_BUCKETS


class Gate(NamedTuple):
    """The way into one region: its handler, and what puts another in its place while it is served."""

    region: int  # its VFIO_PCI_*_REGION_INDEX
    handler: RegionHandler
    exchange: Callable[[RegionHandler], None]


@dataclass(frozen=True)
class RegionMemory:
    """Memory behind a region, for the library to serve without a handler. All of it is shared with C.

    Attributes:
        data: shape (size_bytes,) uint8; what is behind its end reads as 0xff.
        codes: of each page, shape (page_count,) uint8.
        page_size_bytes: a power of two.
        written: stored into `codes` for a page that is written.
        window: where in `data` the region begins, shape (1,) uint64.
        running: whether accesses may be served, shape (1,) uint8.
        edges_ns: ascending upper edges of the buckets of durations.
        reads, writes: number, bytes, nanoseconds, then the buckets; shape (3 + edges + 1,) uint64.
    """

    data: npt.NDArray[np.uint8]
    codes: npt.NDArray[np.uint8]
    page_size_bytes: int
    written: int
    window: npt.NDArray[np.uint64]
    running: npt.NDArray[np.uint8]
    edges_ns: Sequence[int]
    reads: npt.NDArray[np.uint64]
    writes: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class RegionSetup:
    """A region to set up.

    Attributes:
        handler: called with (data, offset, is_write); fills or takes `data`, which is dead afterwards.
        fd: file that a client may map, or -1 for a region that is only reached through `handler`. Its size
            has to be the region's.
        mapped_bytes: how much of the region, from its start, the file is mapped for; whole pages.
        memory: serves the accesses as long as `handler` has no other in its place; only with our library.
        has_work: called after each write that `handler` served: whether `Context.serve` is to return.
    """

    index: int
    size_bytes: int
    handler: RegionHandler
    name: str
    fd: int = -1
    mapped_bytes: int = 0
    memory: RegionMemory | None = None
    has_work: Callable[[], bool] = lambda: True


def region_memory_struct(memory: RegionMemory) -> tuple[Any, object]:
    """Return what C reads of `memory`, and what has to live as long as that, beside `memory` itself."""
    edges = np.array(memory.edges_ns, dtype=np.uint64)
    buckets = (_COUNTS_BEFORE_BUCKETS + len(edges) + 1,)
    assert memory.reads.shape == memory.writes.shape == buckets
    assert len(memory.codes) * memory.page_size_bytes == len(memory.data)
    struct = _ffi.RegionMemoryStruct(
        data=_ffi.address_of(memory.data),
        size=len(memory.data),
        marks=_ffi.address_of(memory.codes),
        page_shift=memory.page_size_bytes.bit_length() - 1,
        mark=memory.written,
        enabled=1,
        nr_edges=len(edges),
        edges=_ffi.address_of(edges),
        window=_ffi.address_of(memory.window),
        running=_ffi.address_of(memory.running),
        reads=_ffi.address_of(memory.reads),
        writes=_ffi.address_of(memory.writes),
    )
    return struct, edges


def switched(
    struct: Any, own: RegionHandler, exchange: Callable[[RegionHandler], None]
) -> Callable[[RegionHandler], None]:
    """Return an `exchange` that has C serve the memory of `struct` while the handler is `own`."""

    def exchange_both(other: RegionHandler) -> None:
        struct.enabled = other is own
        exchange(other)

    return exchange_both
