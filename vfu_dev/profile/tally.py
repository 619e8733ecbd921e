"""Sums and curves of a trace that may be of any length, in memory that is not."""

from __future__ import annotations

import math

from vfu_dev.profile.values import Curve, Distribution

# Up to this number of different values are kept as they are; of more, groups are, each a fifth wide.
EXACT_VALUES = 32
_GROUP_RATIO = 2**0.25
# A curve has at most twice this before every second point is dropped.
CURVE_POINTS = 400


class Tally:
    """Counts values, 0 and above.

    Args: whole: they are whole numbers, and so are those of the distribution.
    """

    def __init__(self, *, whole: bool) -> None:
        self._whole = whole
        self._exact: dict[float, int] = {}
        # group -> how often, sum
        self._groups: dict[int, tuple[int, float]] = {}
        self.count = 0
        self.total: float = 0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.count += times
        self.total += value * times
        if self._groups:
            self._to_group(value, times)
            return
        self._exact[value] = self._exact.get(value, 0) + times
        if len(self._exact) > EXACT_VALUES:
            for one, often in self._exact.items():
                self._to_group(one, often)
            self._exact.clear()

    def _to_group(self, value: float, times: int) -> None:
        number = math.floor(math.log(value, _GROUP_RATIO)) if value > 0 else -1000
        count, total = self._groups.get(number, (0, 0))
        self._groups[number] = (count + times, total + value * times)

    def distribution(self) -> Distribution | None:
        """Return what was counted: a group by its mean, None of nothing; a sum of whole numbers is exact."""
        points: dict[float, int] = {}

        def add(value: float, times: int) -> None:
            if times:
                points[value] = points.get(value, 0) + times

        for value, times in self._exact.items():
            add(value if self._whole else round(value, 9), times)
        for count, total in self._groups.values():
            if self._whole:
                # The two whole numbers around the mean, so that their sum is the group's.
                low, more = divmod(int(total), count)
                add(low, count - more)
                add(low + 1, more)
            else:
                add(round(total / count, 9), count)
        return Distribution(tuple(sorted(points.items()))) if points else None


class CurveKeeper:
    """Keeps a curve in at most twice CURVE_POINTS points, the first and the last among them."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None
        self._every = 1
        self._skipped = 0

    def add(self, seconds: float, value: float) -> None:
        """Add a point; one that would fall behind the last in time is as late as it."""
        if self._last is not None:
            seconds = max(seconds, self._last[0])
        self._last = (seconds, value)
        self._skipped += 1
        if self._skipped < self._every and self._points:
            return
        self._skipped = 0
        self._points.append(self._last)
        if len(self._points) >= 2 * CURVE_POINTS:
            self._points = self._points[::2]
            self._every *= 2

    def __len__(self) -> int:
        return len(self._points)

    @property
    def end_seconds(self) -> float:
        """When the last point was."""
        return self._last[0] if self._last is not None else 0.0

    def curve(self) -> Curve:
        """Return the points."""
        points = list(self._points)
        if self._last is not None and points[-1] != self._last:
            points.append(self._last)
        return tuple(points)
