"""Draws from a profile's distributions."""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate

from vfu_dev.profile import Distribution, Value

_SEED = 1


class Draw:
    """Draws the values of a distribution in random order, each as often as it says, then all over again.

    So the sum of as many draws as were recorded is the sum that was recorded.
    """

    def __init__(self, distribution: Distribution) -> None:
        self._points = distribution.points
        self._random = random.Random(_SEED)
        self._left: list[int] = []  # of each point, in this round
        self._total = 0

    def __call__(self) -> float:
        """Return the next value."""
        if not self._total:
            self._left = [count for _, count in self._points]
            self._total = sum(self._left)
        at = self._random.randrange(self._total)
        index = bisect_right(list(accumulate(self._left)), at)
        self._left[index] -= 1
        self._total -= 1
        return self._points[index][0]


def draw_of(value: Value[Distribution] | None) -> Draw | None:
    """Return the draws of a marked distribution, None of one that is not known."""
    return None if value is None else Draw(value.value)
