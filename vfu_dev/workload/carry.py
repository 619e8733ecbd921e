"""Carries out writes on an array: used by every generator in Python, and as the reference of a check."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vfu_dev.workload.splitmix import GOLDEN
from vfu_dev.workload.writes import DRAW_CONTENT, Writes, contents, draw

# Writes from this size on are computed where they go; smaller ones in batches (measured: equal at 32 KiB).
_DIRECT_BYTES = 32 << 10

Pages = npt.NDArray[np.intp]


class ArrayWriter:
    """Makes the writes of a load on the bytes of one memory.

    Args:
        data: shape (n,) uint8, C-contiguous, of whole pages; written in place.
        page_bytes: of the memory, a power of two of at least 64.
        writes: of a load on a memory of this size.
    """

    def __init__(self, data: npt.NDArray[np.uint8], page_bytes: int, writes: Writes) -> None:
        self._data = data
        self._page_bytes = page_bytes
        self._writes = writes
        size = writes.write_bytes
        self.bytes_per_write = size
        self._table: npt.NDArray[Any] | None = None
        if size is not None and not writes.scattered:
            # Writes of one size begin at multiples of it within a place: an array whose elements are whole
            # writes takes a batch in one assignment. numpy moves words of 8 bytes fastest.
            span = -(-size // page_bytes)
            self._place_bytes = span * page_bytes
            places = len(data) // self._place_bytes
            slots = max(1, page_bytes // size)
            self._element = np.dtype("<u8") if size == 8 else np.dtype(f"V{size}")
            self._table = np.ndarray(
                (places, slots), self._element, buffer=data.data, strides=(self._place_bytes, size)
            )
            self._pages = np.arange(span, dtype=np.intp)
            self._words: npt.NDArray[np.uint64] = data.view("<u8")
            self._steps = np.arange(size // 8, dtype=np.uint64) * np.uint64(GOLDEN)

    def write(self, first: int, count: int) -> tuple[int, Pages]:
        """Make the writes from number `first`.

        Returns: the bytes written, and the pages they touched, shape (n,), repeats and all.
        """
        if self._table is None or self.bytes_per_write is None:
            return self._write_singly(first, count)
        writes, size = self._writes, self.bytes_per_write
        offsets = writes.offsets(first, count)
        if size >= _DIRECT_BYTES and size % 8 == 0:
            starts = draw(writes.seed, DRAW_CONTENT, first, count)
            for offset, start in zip((offsets // 8).tolist(), starts, strict=True):
                np.add(self._steps, start, out=self._words[offset : offset + size // 8])
        else:
            data = contents(writes.seed, first, count, size)
            places, rest = np.divmod(offsets, self._place_bytes)
            # A place named twice keeps the later write: numpy assigns in order.
            self._table[places, rest // size] = np.ascontiguousarray(data).view(self._element)[:, 0]
        pages = offsets // self._page_bytes
        if len(self._pages) > 1:
            pages = (pages[:, np.newaxis] + self._pages).reshape(-1)
        return size * count, pages

    def _write_singly(self, first: int, count: int) -> tuple[int, Pages]:
        offsets, lengths = self._writes.offsets(first, count), self._writes.lengths(first, count)
        pages = []
        for number, (offset, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True)):
            self._data[offset : offset + length] = contents(self._writes.seed, first + number, 1, length)[0]
            pages.append(np.arange(offset // self._page_bytes, (offset + length - 1) // self._page_bytes + 1))
        return int(lengths.sum()), np.concatenate(pages) if pages else np.empty(0, dtype=np.intp)
