"""Two profiles beside each other: where they differ by more than is allowed."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vfu_dev.profile.keys import Entry, entries
from vfu_dev.profile.kinds import SECONDS, SECONDS_SPREAD, CurveKind, Kind, Number, Spread
from vfu_dev.profile.model import Profile
from vfu_dev.profile.values import Curve, Distribution, Mark, Value

# Of a distribution these are compared, besides its mean.
QUANTILES = (0.5, 0.9)
# A curve is compared at this many times.
_CURVE_TIMES = 100


@dataclass(frozen=True)
class Tolerance:
    """How much two profiles may differ.

    Attributes:
        size_part: of sizes and rates, a part of the larger one; 0: not at all.
        time_part, time_least: of times, a part of the larger one, or `time_least` seconds if that is more.
    """

    size_part: float = 0.0
    time_part: float = 0.10
    time_least: float = 0.002

    def allows(self, a: float, b: float, *, time: bool) -> bool:
        """Return whether the two are the same."""
        if time:
            return abs(a - b) <= max(self.time_least, self.time_part * max(a, b))
        return abs(a - b) <= self.size_part * max(a, b)


@dataclass(frozen=True)
class Difference:
    """A key whose values differ.

    Attributes:
        a, b: as a file would have them; None where it is not known.
        text: what differs, in words.
    """

    key: str
    a: str | None
    b: str | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def differences(a: Profile, b: Profile, tolerance: Tolerance, *, measured: bool = False) -> list[Difference]:
    """Return where two profiles differ; names, sources, marks and what was recorded are not compared.

    Args: measured: compare only values that are measured in both.
    """
    ours, theirs = ({entry.key: entry for entry in entries(one)} for one in (a, b))
    if measured:
        ours, theirs = (
            {key: one for key, one in found.items() if is_measured(one)} for found in (ours, theirs)
        )
        ours = {key: one for key, one in ours.items() if key in theirs}
        theirs = {key: one for key, one in theirs.items() if key in ours}
    found = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        one, other = ours.get(key), theirs.get(key)
        texts = [None if entry is None else entry.kind.text(entry.plain) for entry in (one, other)]
        if one is None or other is None:
            words = "only the second has it" if one is None else "only the first has it"
        else:
            words = "; ".join(_words(key, one.kind, one.plain, other.plain, tolerance))
        if words:
            found.append(Difference(key, texts[0], texts[1], words))
    return found


def is_measured(entry: Entry) -> bool:
    """Return whether a value is one that a trace shows."""
    return isinstance(entry.value, Value) and entry.value.mark is Mark.MEASURED


def _words(key: str, kind: Kind, a: Any, b: Any, tolerance: Tolerance) -> Iterator[str]:
    """Yield what differs between two values of one kind."""
    if isinstance(kind, Spread):
        yield from _spreads(kind.each, a, b, tolerance)
    elif isinstance(kind, CurveKind):
        a, b = (from_beginning(key, curve) for curve in (a, b))
        yield from (_steps if key.endswith(".steps") else _curves)(a, b, tolerance)
    elif isinstance(kind, Number):
        if not tolerance.allows(a, b, time=kind is SECONDS):
            yield f"{kind.text(a)} and {kind.text(b)}{_part(a, b)}"
    elif a != b:
        yield f"{kind.text(a)} and {kind.text(b)}"


def _spreads(each: Number, a: Distribution, b: Distribution, tolerance: Tolerance) -> Iterator[str]:
    figures = [("mean", a.mean, b.mean)]
    figures += [(f"{part:.0%} quantile", a.quantile(part), b.quantile(part)) for part in QUANTILES]
    for name, one, other in figures:
        if not tolerance.allows(one, other, time=each is SECONDS_SPREAD.each):
            yield f"{name} {one:.6g} and {other:.6g}{_part(one, other)}"


def _curves(a: Curve, b: Curve, tolerance: Tolerance) -> Iterator[str]:
    """Compare in the time that both have, and the end of the one that has more."""
    ends = a[-1][0], b[-1][0]
    most = max(value for _, value in (*a, *b))
    times = [min(ends) * number / _CURVE_TIMES for number in range(_CURVE_TIMES + 1)]
    worst, when = max((abs(value_at(a, at, steps=False) - value_at(b, at, steps=False)), -at) for at in times)
    # What is a moment earlier or later in a steep place is no other curve.
    if worst > tolerance.size_part * most + tolerance.time_least * _steepest(a, b):
        yield f"{worst:.6g} apart at {-when:.3f} s, of {most:.6g} at most"
    if not tolerance.allows(*ends, time=True) and a[-1][1] != b[-1][1]:
        yield f"end at {ends[0]:.3f} s and {ends[1]:.3f} s"


def _steps(a: Curve, b: Curve, tolerance: Tolerance) -> Iterator[str]:
    """Compare each step with what the other profile has at its time, or a moment earlier or later."""
    most = max(value for _, value in (*a, *b))
    found = (
        (_apart(value, other, at, tolerance.time_least), -at)
        for one, other in ((a, b), (b, a))
        for at, value in _each_step(one)
    )
    worst, when = max(found)
    if worst > tolerance.size_part * most:
        yield f"{worst:.6g} apart at {-when:.3f} s, of {most:.6g} at most"


def _each_step(curve: Curve) -> Iterator[tuple[float, float]]:
    """Yield a time within each step of a curve, and its value; what is over at once is none."""
    for (begin, value), (end, _) in itertools.pairwise(curve):
        if end > begin:
            yield begin, value
            yield (begin + end) / 2, value
    yield curve[-1]


def _apart(value: float, curve: Curve, at: float, least: float) -> float:
    """Return how far a value is from the nearest that a curve of steps has within `least` of a time."""
    begin, end = (bisect_right(curve, one, key=lambda point: point[0]) for one in (at - least, at + least))
    return min(abs(value - other) for _, other in curve[max(0, begin - 1) : max(1, end)])


def _steepest(a: Curve, b: Curve) -> float:
    return max(
        (
            abs(after[1] - before[1]) / (after[0] - before[0])
            for curve in (a, b)
            for before, after in itertools.pairwise(curve)
            if after[0] > before[0]
        ),
        default=0.0,
    )


def from_beginning(key: str, curve: Curve) -> Curve:
    """Return a curve with what it says of the time before its first point, where that is another value."""
    return ((0.0, 0.0), *curve) if key == "dirty.steps" and curve[0][0] > 0 else curve


def value_at(curve: Curve, at: float, *, steps: bool) -> float:
    """Return a curve's value: of the last step, or between two points; outside, that of its end."""
    number = bisect_right(curve, at, key=lambda point: point[0])
    if number == 0:
        return curve[0][1]
    if number == len(curve) or steps:
        return curve[number - 1][1]
    (begin, low), (end, high) = curve[number - 1], curve[number]
    return low + (high - low) * (at - begin) / (end - begin)


def _part(a: float, b: float) -> str:
    return f" ({abs(a - b) / max(a, b):.1%})" if max(a, b) > 0 else ""
