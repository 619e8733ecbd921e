"""What a profile's values are: each says where it is from, and some are distributions or curves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Generic, TypeVar

T = TypeVar("T")

# (seconds since PRE_COPY was entered, bytes or bytes a second), in the order of time.
Curve = tuple[tuple[float, float], ...]


class Mark(StrEnum):
    """Where a value is from."""

    MEASURED = "measured"  # the trace shows it
    BOUNDED = "bounded"  # the trace shows a limit of it: see Value.lowest and Value.highest
    ASSUMED = "assumed"  # nobody measured it: published, computed, guessed


@dataclass(frozen=True)
class Value(Generic[T]):
    """A value and its mark.

    Attributes:
        value: what a replay keeps to. Of a bounded one: the upper bound, else the lower.
        lowest, highest: bounds of a bounded value, None where there is none; None of all others.
    """

    value: T
    mark: Mark
    lowest: T | None = None
    highest: T | None = None

    @classmethod
    def measured(cls, value: T) -> Value[T]:
        """Return a value that a trace shows."""
        return cls(value, Mark.MEASURED)

    @classmethod
    def assumed(cls, value: T) -> Value[T]:
        """Return a value that nobody measured."""
        return cls(value, Mark.ASSUMED)

    @classmethod
    def bounded(cls, *, at_least: T | None = None, at_most: T | None = None) -> Value[T]:
        """Return a value of which limits are known. Raises: ValueError: none is given."""
        value = at_least if at_most is None else at_most
        if value is None:
            raise ValueError("at_least, at_most or both")
        return cls(value, Mark.BOUNDED, at_least, at_most)


@dataclass(frozen=True)
class Distribution:
    """How often which value occurs: its sum is exact, its quantiles are as fine as its points.

    Attributes:
        points: (value, how often), values ascending, at least one; how often is above 0.
    """

    points: tuple[tuple[float, int], ...]

    @classmethod
    def always(cls, value: float) -> Distribution:
        """Return the distribution of one value."""
        return cls(((value, 1),))

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        """Return the distribution of `values`, at least one."""
        counts: dict[float, int] = {}
        for value in values:
            counts[value] = counts.get(value, 0) + 1
        return cls(tuple(sorted(counts.items())))

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(count for _, count in self.points)

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(value * count for value, count in self.points)

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / self.count

    @property
    def lowest(self) -> float:
        """The smallest."""
        return self.points[0][0]

    @property
    def highest(self) -> float:
        """The largest."""
        return self.points[-1][0]

    def quantile(self, part: float) -> float:
        """Return the smallest value that at least `part` (0 to 1) of all values do not exceed."""
        ends = list(accumulate(count for _, count in self.points))
        # What is due to rounding alone does not reach for the next value.
        at = bisect_left(ends, part * ends[-1] * (1 - 1e-12))
        return self.points[min(at, len(ends) - 1)][0]
