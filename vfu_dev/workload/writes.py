"""Which write comes where: write n of a load as a function of the load, the memory and n, nothing else.

A memory is divided into places: runs of as many pages as one write touches, one page for a write of up to a
page. A pattern chooses a place for each write; the write begins in it at a multiple of its own size. Four
splitmix64 outputs belong to write n, 4n to 4n + 3: `DRAW_*` says which decides what.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import ConfigError
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES, Workload
from vfu_dev.workload.splitmix import GOLDEN, Words, below, fractions, outputs
from vfu_dev.workload.trace import Trace

DRAWS = 4
DRAW_PLACE = 0  # which place
DRAW_HOT = 1  # whether a hot one
DRAW_SLOT = 2  # where in its page, for writes of less than a page
DRAW_CONTENT = 3  # what is written

# The table of a Zipf distribution has eight bytes for each place: 128 MiB at the limit.
MAX_ZIPF_PLACES = 1 << 24

Offsets = npt.NDArray[np.int64]


def draw(seed: int, which: int, first: int, count: int) -> Words:
    """Return the output that decides `which` (`DRAW_*`) for the writes from `first`, shape (count,)."""
    return outputs(seed, DRAWS * first + which, count, DRAWS)


def contents(seed: int, first: int, count: int, write_bytes: int) -> npt.NDArray[np.uint8]:
    """Return what the writes from `first` write, shape (count, write_bytes).

    64-bit word i of write n, little endian, is its output `DRAW_CONTENT` + i * 0x9E3779B97F4A7C15; a write
    that is no multiple of eight bytes long ends within a word.
    """
    words = -(-write_bytes // 8)
    starts = draw(seed, DRAW_CONTENT, first, count)
    steps = np.arange(words, dtype=np.uint64) * np.uint64(GOLDEN)
    table: Words = starts[:, np.newaxis] + steps[np.newaxis, :]
    return table.astype("<u8", copy=False).view(np.uint8)[:, :write_bytes]


class Writes(ABC):
    """The writes of a load on one memory; `writes_of` makes one.

    Attributes:
        seed: of what they write.
        scattered: they begin anywhere, not in places at multiples of their size.
    """

    seed: int
    scattered = False

    @abstractmethod
    def offsets(self, first: int, count: int) -> Offsets:
        """Return where the writes from number `first` go, shape (count,), bytes from the memory's start."""

    @abstractmethod
    def lengths(self, first: int, count: int) -> Offsets:
        """Return how many bytes each of them writes, shape (count,)."""

    @property
    @abstractmethod
    def write_bytes(self) -> int | None:
        """Bytes of every write, None where they differ."""


class PlacedWrites(Writes):
    """Writes of one size to places that a pattern chooses.

    Attributes:
        places: how many the memory has.
        span: pages of each.
    """

    def __init__(self, spec: Workload, memory_bytes: int, page_bytes: int) -> None:
        self.spec = spec
        self.seed = spec.seed
        self.span = spec.pages_per_write(page_bytes)
        self.places = memory_bytes // page_bytes // self.span
        if not self.places:
            raise ConfigError(f"a write of {spec.write_bytes} bytes does not fit a memory of {memory_bytes}")
        self._place_bytes = self.span * page_bytes
        self._slots = max(1, page_bytes // spec.write_bytes)

    @property
    def write_bytes(self) -> int:
        """Bytes of every write."""
        return self.spec.write_bytes

    def lengths(self, first: int, count: int) -> Offsets:
        """Return the size of a write, `count` times."""
        return np.full(count, self.spec.write_bytes, dtype=np.int64)

    def offsets(self, first: int, count: int) -> Offsets:
        """Return where the writes go."""
        offsets = self.chosen(first, count).astype(np.int64) * self._place_bytes
        if self._slots > 1:
            slots = below(draw(self.seed, DRAW_SLOT, first, count), self._slots)
            offsets += slots.astype(np.int64) * self.spec.write_bytes
        return offsets

    @abstractmethod
    def chosen(self, first: int, count: int) -> Words:
        """Return the place of each write, shape (count,)."""


class SequentialWrites(PlacedWrites):
    """One place after the other."""

    def chosen(self, first: int, count: int) -> Words:
        """Return n modulo the places."""
        start = first % self.places
        return (np.arange(count, dtype=np.uint64) + np.uint64(start)) % np.uint64(self.places)


class UniformWrites(PlacedWrites):
    """Every place as likely as the other."""

    def chosen(self, first: int, count: int) -> Words:
        """Return random places."""
        return below(draw(self.seed, DRAW_PLACE, first, count), self.places)


class HotsetWrites(PlacedWrites):
    """The places at the start of the memory get their share, those behind them the rest.

    Attributes:
        hot: number of hot places, at least one.
    """

    def __init__(self, spec: Workload, memory_bytes: int, page_bytes: int) -> None:
        super().__init__(spec, memory_bytes, page_bytes)
        self.hot = max(1, int(self.places * spec.hot_fraction))

    def chosen(self, first: int, count: int) -> Words:
        """Return a hot place or one of the others; where all are hot, any."""
        numbers = draw(self.seed, DRAW_PLACE, first, count)
        hot = below(numbers, self.hot)
        if self.hot == self.places:
            return hot
        cold = below(numbers, self.places - self.hot) + np.uint64(self.hot)
        is_hot = fractions(draw(self.seed, DRAW_HOT, first, count)) < self.spec.hot_share
        chosen: Words = np.where(is_hot, hot, cold)
        return chosen


class ZipfWrites(PlacedWrites):
    """Place r gets a share proportional to 1 / (r + 1) ** exponent; by a table of sums, so exactly."""

    def __init__(self, spec: Workload, memory_bytes: int, page_bytes: int) -> None:
        super().__init__(spec, memory_bytes, page_bytes)
        if self.places > MAX_ZIPF_PLACES:
            raise ConfigError(f"zipf: {self.places} places, the table has at most {MAX_ZIPF_PLACES}")
        ranks = np.arange(1, self.places + 1, dtype=np.float64)
        self.sums = np.cumsum(ranks**-spec.zipf_exponent)

    def chosen(self, first: int, count: int) -> Words:
        """Return the number of sums that are not above the fraction's part of the whole sum."""
        sought = fractions(draw(self.seed, DRAW_PLACE, first, count)) * self.sums[-1]
        found: Words = np.searchsorted(self.sums, sought, side="right").astype(np.uint64)
        np.minimum(found, np.uint64(self.places - 1), out=found)
        return found


class TraceWrites(Writes):
    """What a file recorded, round after round."""

    scattered = True

    def __init__(self, trace: Trace, seed: int, memory_bytes: int) -> None:
        ends = trace.offsets + trace.lengths
        beyond = np.flatnonzero(ends > memory_bytes)
        if len(beyond):
            raise ConfigError(
                f"{trace.path}: write {beyond[0]} ends at {ends[beyond[0]]}, the memory at {memory_bytes}"
            )
        self.seed = seed
        self._trace = trace

    def offsets(self, first: int, count: int) -> Offsets:
        """Return where the writes go."""
        return self._trace.offsets[self._rows(first, count)]

    def lengths(self, first: int, count: int) -> Offsets:
        """Return how long they are."""
        return self._trace.lengths[self._rows(first, count)]

    def _rows(self, first: int, count: int) -> Offsets:
        return (np.arange(count, dtype=np.int64) + first % len(self._trace)) % len(self._trace)

    @property
    def write_bytes(self) -> int | None:
        """The bytes of every write, where the file has one length only."""
        lengths = self._trace.lengths
        return int(lengths[0]) if (lengths == lengths[0]).all() else None


_PLACED: dict[str, type[PlacedWrites]] = {
    "sequential": SequentialWrites,
    "uniform": UniformWrites,
    "hotset": HotsetWrites,
    "zipf": ZipfWrites,
}


def writes_of(
    spec: Workload, memory_bytes: int, page_bytes: int = DEFAULT_PAGE_BYTES, trace: Trace | None = None
) -> Writes | None:
    """Return the writes of a load without phases; None where nothing is ever written.

    Args: trace: what `spec.trace` names, when it was read already.
    Raises: ConfigError: the memory is too small for them; the file cannot be used.
    """
    if spec.phases:
        raise ConfigError("phases: each phase has writes of its own")
    if spec.is_idle:
        return None
    if spec.trace is not None:
        return TraceWrites(trace or Trace.read(spec.trace), spec.seed, memory_bytes)
    return _PLACED[spec.pattern](spec, memory_bytes, page_bytes)
