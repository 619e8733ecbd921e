"""A profile with parameters from a recorded one: what a rate or a constant says as well as a curve does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

from vfu_dev.profile.compare import value_at
from vfu_dev.profile.model import Calls, Dirty, Phases, Profile, StopCopy
from vfu_dev.profile.values import Curve, Distribution, Mark, Value

# The parts of a curve's height by which a line may miss it.
LINE_PART, STEPS_PART = 0.05, 0.02
MAX_STEPS = 12
MAX_SPREAD = 8
# Jumps of one kind: as many, each by no more than this part apart from the middle one.
_JUMPS, _ALIKE = 3, 0.1
# Quantiles at which a spread may differ from the recorded one.
_COMPARED = (0.1, 0.25, 0.5, 0.75, 0.9)

_P = TypeVar("_P", bound=Phases)


@dataclass(frozen=True)
class Fitted:
    """What became of a key.

    Attributes:
        was, now: in words.
        error_part: by how much the new one misses the recorded one at most, a part of its height.
    """

    key: str
    was: str
    now: str
    error_part: float


def fit(profile: Profile) -> tuple[Profile, list[Fitted]]:
    """Return the parametric profile, and what was changed; what nothing fits stays as it was recorded."""
    fitted: list[Fitted] = []
    found = replace(
        profile,
        dirty=_dirty(profile.dirty, fitted),
        stop_copy=_stop_copy(profile.stop_copy, fitted),
        reads=_phases(profile.reads, "reads", fitted),
        writes=_phases(profile.writes, "writes", fitted),
    )
    if fitted:
        about = " ".join(filter(None, [profile.about, "Fitted from what was recorded."]))
        found = replace(found, about=about)
    return found, fitted


def _dirty(dirty: Dirty, fitted: list[Fitted]) -> Dirty:
    if dirty.curve is None or dirty.curve.value[-1][0] <= 0:
        return dirty
    curve = dirty.curve.value
    was = f"curve of {len(curve)} points"
    if (jumps := _refills(curve)) is not None:
        size, seconds = jumps
        fitted.append(Fitted("dirty", was, f"refill of {size} bytes each {seconds:.3f} s", _ALIKE))
        return Dirty(
            kind="refill",
            refill_bytes=Value.assumed(size),
            refill_seconds=Value.assumed(round(seconds, 6)),
            limit_bytes=dirty.limit_bytes,
        )
    line = _chords(curve, [0, len(curve) - 1])
    if _miss(curve, line) <= LINE_PART:
        rate = (curve[-1][1] - curve[0][1]) / (curve[-1][0] - curve[0][0])
        fitted.append(Fitted("dirty", was, f"{rate:.0f} bytes a second", _miss(curve, line)))
        return Dirty(
            kind="rate",
            bytes_per_second=Value.assumed(round(max(0.0, rate), 3)),
            limit_bytes=dirty.limit_bytes,
        )
    chords = _polyline(curve)
    if len(chords) > MAX_STEPS or len(chords) >= len(curve):
        return dirty
    steps = tuple(
        (before[0], round(max(0.0, (after[1] - before[1]) / (after[0] - before[0])), 3))
        for before, after in itertools.pairwise(chords)
        if after[0] > before[0]
    )
    fitted.append(Fitted("dirty", was, f"{len(steps)} steps", _miss(curve, chords)))
    return Dirty(kind="steps", steps=Value.assumed(steps), after=dirty.after, limit_bytes=dirty.limit_bytes)


def _refills(curve: Curve) -> tuple[int, float] | None:
    """Return size and period of jumps of one size, between which nothing becomes dirty."""
    rises = [(after[0], after[1] - before[1]) for before, after in itertools.pairwise(curve)]
    height = curve[-1][1] - curve[0][1]
    if min(rise for _, rise in rises) < -LINE_PART * height:
        return None
    jumps = [number for number, (_, rise) in enumerate(rises) if rise > LINE_PART * height]
    if len(jumps) < _JUMPS or sum(rises[number][1] for number in jumps) < (1 - LINE_PART) * height:
        return None
    # One rise right behind the other is a rate: between two jumps there is a pause.
    if any(after - before < 2 for before, after in itertools.pairwise(jumps)):
        return None
    sizes = [rises[number][1] for number in jumps]
    size = median(sizes)
    period = median(rises[after][0] - rises[before][0] for before, after in itertools.pairwise(jumps))
    alike = all(abs(one - size) <= _ALIKE * size for one in sizes)
    return (round(size), period) if alike and period > 0 else None


def _stop_copy(stop_copy: StopCopy, fitted: list[Fitted]) -> StopCopy:
    if stop_copy.steps is None:
        return stop_copy
    curve = stop_copy.steps.value
    was = f"{len(curve)} steps"
    low, high = min(value for _, value in curve), max(value for _, value in curve)
    if high - low <= STEPS_PART * high:
        middle = round(median(value for _, value in curve))
        fitted.append(Fitted("stop_copy", was, f"constant, {middle} bytes", (high - low) / max(high, 1)))
        return replace(stop_copy, kind="constant", steps=None, bytes=Value.assumed(middle))
    line = _chords(curve, [0, len(curve) - 1])
    seconds = curve[-1][0] - curve[0][0]
    if len(curve) > 2 and seconds > 0 and line[-1][1] > line[0][1] and _miss(curve, line) <= LINE_PART:
        rate = (curve[-1][1] - curve[0][1]) / seconds
        begin = max(0, round(curve[0][1] - rate * curve[0][0]))
        fitted.append(Fitted("stop_copy", was, f"growing by {rate:.0f} bytes a second", _miss(curve, line)))
        return replace(
            stop_copy,
            kind="growing",
            steps=None,
            bytes=Value.assumed(begin),
            bytes_per_second=Value.assumed(round(rate, 3)),
        )
    return stop_copy


def _phases(phases: _P, name: str, fitted: list[Fitted]) -> _P:
    return replace(
        phases,
        initial=_calls(phases.initial, f"{name}.initial", fitted),
        dirty=_calls(phases.dirty, f"{name}.dirty", fitted),
        stop_copy=_calls(phases.stop_copy, f"{name}.stop_copy", fitted),
    )


def _calls(calls: Calls, key: str, fitted: list[Fitted]) -> Calls:
    return replace(
        calls,
        bytes=_spread(calls.bytes, f"{key}.bytes", fitted, whole=True),
        seconds=_spread(calls.seconds, f"{key}.seconds", fitted, whole=False),
    )


def _spread(
    value: Value[Distribution] | None, key: str, fitted: list[Fitted], *, whole: bool
) -> Value[Distribution] | None:
    if value is None or len(value.value.points) <= MAX_SPREAD:
        return value
    spread = grouped(value.value, whole=whole)
    was, now = (f"spread of {len(one.points)} values" for one in (value.value, spread))
    worst = max(abs(spread.quantile(part) - value.value.quantile(part)) for part in _COMPARED)
    fitted.append(Fitted(key, was, now, worst / value.value.highest if worst else 0.0))
    return Value.assumed(spread) if value.mark is not Mark.BOUNDED else Value.bounded(at_most=spread)


def grouped(spread: Distribution, *, whole: bool) -> Distribution:
    """Return a distribution of MAX_SPREAD values at most: groups as large as each other, by their means."""
    counts: list[list[float]] = []
    room = spread.count / MAX_SPREAD
    filled = 0.0
    for value, count in spread.points:
        number = min(MAX_SPREAD - 1, int((filled + count / 2) / room))
        filled += count
        while len(counts) <= number:
            counts.append([0.0, 0.0])
        counts[number][0] += count
        counts[number][1] += value * count
    points: dict[float, int] = {}
    for often, total in counts:
        if often:
            mean: float = round(total / often) if whole else round(total / often, 9)
            points[mean] = points.get(mean, 0) + int(often)
    return Distribution(tuple(sorted(points.items())))


# --- lines --------------------------------------------------------------------------------------------------


def _chords(curve: Curve, places: Sequence[int]) -> Curve:
    return tuple(curve[place] for place in places)


def _miss(curve: Curve, line: Curve) -> float:
    """Return by how much a line misses a curve's points at most, a part of the curve's height."""
    values = [value for _, value in curve]
    height = max(values) - min(values)
    worst = max(abs(value_at(line, at, steps=False) - value) for at, value in curve)
    return worst / height if height else 0.0


def _polyline(curve: Curve) -> Curve:
    """Return points of a curve whose chords miss it by no more than STEPS_PART, the worst first each time.

    Source: Douglas and Peucker 1973.
    """
    places = [0, len(curve) - 1]
    while len(places) <= MAX_STEPS + 1:
        line = _chords(curve, places)
        misses = [abs(value_at(line, at, steps=False) - value) for at, value in curve]
        worst = max(range(len(curve)), key=misses.__getitem__)
        if worst in places or _miss(curve, line) <= STEPS_PART:
            break
        places = sorted([*places, worst])
    return _chords(curve, places)
