"""A profile for people: a sentence, lines of a table, a curve in characters."""

from __future__ import annotations

from typing import Any

from vfu_dev.profile.compare import value_at
from vfu_dev.profile.kinds import BANDWIDTH, BYTES, MILLISECONDS, RATE, SECONDS, CurveKind, Number, Spread
from vfu_dev.profile.model import Profile
from vfu_dev.profile.values import Curve, Distribution, Mark, Value
from vfu_dev.sizes import format_size

_BARS = " ▁▂▃▄▅▆▇█"
CURVE_COLUMNS = 60


def sentence(profile: Profile) -> str:
    """Return what the profile says, in one sentence; it says as well what it does not say."""
    parts = []
    if profile.features.pre_copy is not None and not profile.features.pre_copy.value:
        parts.append("no PRE_COPY")
    if profile.initial.bytes is not None:
        parts.append(f"{format_size(profile.initial.bytes.value)} of initial data")
    parts.append(_dirty(profile))
    parts.append(_length(profile))
    slow = _slowest_arc(profile)
    if slow is not None:
        side, arc, value = slow
        parts.append(
            f"its slowest change of state is {arc.replace('->', ' to ')} at the {side}: "
            f"{_limit(value)}{_time(value.value.mean)}"
        )
    if profile.loading.initial_seconds is not None:
        loading = profile.loading.initial_seconds
        parts.append(f"loading the initial data takes {_limit(loading)}{_time(loading.value)}")
    if profile.reinits:
        parts.append(f"initial data appears {len(profile.reinits)} more times")
    return f"{profile.name or 'This device'}: {'; '.join(filter(None, parts))}."


def _dirty(profile: Profile) -> str:
    dirty = profile.dirty
    limit = f", {format_size(dirty.limit_bytes.value)} at most" if dirty.limit_bytes is not None else ""
    match dirty.kind:
        case None:
            return "how it becomes dirty is not known"
        case "none":
            return "nothing becomes dirty in PRE_COPY"
        case "rate":
            assert dirty.bytes_per_second is not None
            return f"{format_size(dirty.bytes_per_second.value)} a second become dirty{limit}"
        case "refill":
            assert dirty.refill_bytes is not None
            assert dirty.refill_seconds is not None
            size, seconds = format_size(dirty.refill_bytes.value), _time(dirty.refill_seconds.value)
            return f"{size} become dirty at once when all was read, each {seconds} at most"
        case "steps":
            assert dirty.steps is not None
            return f"it becomes dirty at {len(dirty.steps.value)} rates, one after the other{limit}"
    assert dirty.curve is not None
    end, last = dirty.curve.value[-1]
    return f"{format_size(last)} became dirty in {_time(end)}{limit}"


def _length(profile: Profile) -> str:
    stop_copy = profile.stop_copy
    match stop_copy.kind:
        case None:
            return ""
        case "constant":
            assert stop_copy.bytes is not None
            size = stop_copy.bytes
            return f"stop_copy_length is {_limit(size)}{format_size(size.value)}, whatever was read"
        case "following":
            assert stop_copy.extra_bytes is not None
            extra = stop_copy.extra_bytes
            return f"stop_copy_length is what is left and {_limit(extra)}{format_size(extra.value)}"
        case "growing":
            assert stop_copy.bytes is not None
            assert stop_copy.bytes_per_second is not None
            begin, rate = format_size(stop_copy.bytes.value), format_size(stop_copy.bytes_per_second.value)
            return f"stop_copy_length grows from {begin} by {rate} a second"
    assert stop_copy.steps is not None
    sizes = [value for _, value in stop_copy.steps.value]
    return f"stop_copy_length is between {format_size(min(sizes))} and {format_size(max(sizes))}"


def _limit(value: Value[Any]) -> str:
    """Return what a bounded value is, in words before it; nothing of others."""
    if value.mark is not Mark.BOUNDED:
        return ""
    return "at least " if value.highest is None else "at most "


def _slowest_arc(profile: Profile) -> tuple[str, str, Value[Distribution]] | None:
    """Return side, FROM->TO and seconds of the change of state that takes longest, by the mean."""
    found = [
        (side, arc, value)
        for side, arcs in (("source", profile.source_arcs), ("destination", profile.destination_arcs))
        for arc, value in arcs.items()
    ]
    return max(found, key=lambda one: one[2].value.mean, default=None)


def shown(kind: Any, value: Any) -> str:
    """Return a value for people: sizes and times with units, a distribution by its quantiles."""
    if isinstance(value, Value):
        value = value.value
    if isinstance(kind, Spread):
        return _spread(kind.each, value)
    if isinstance(kind, CurveKind):
        end, last = value[-1]
        return f"{len(value)} points, {_number(kind.each, last)} at {_time(end)}"
    if isinstance(kind, Number):
        return _number(kind, value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _spread(each: Number, value: Distribution) -> str:
    times = f"{value.count} times, " if value.count > 1 else ""
    if len(value.points) == 1:
        return f"{times}{_brief(each, value.lowest)}"
    figures = [("mean", value.mean), ("50 %", value.quantile(0.5)), ("90 %", value.quantile(0.9))]
    figures.append(("most", value.highest))
    return times + ", ".join(f"{name} {_brief(each, figure)}" for name, figure in figures)


def _brief(each: Number, value: float) -> str:
    return format_size(value) if each is BYTES else _number(each, value)


def _number(kind: Number, value: float) -> str:
    if kind is BYTES:
        exact = f" ({value})" if value >= 1024 and isinstance(value, int) else ""
        return f"{format_size(value)}{exact}"
    if kind is SECONDS:
        return _time(value)
    if kind is RATE:
        return f"{format_size(value)}/s"
    if kind is BANDWIDTH:
        return f"{format_size(value)}/s ({value})"
    if kind is MILLISECONDS:
        return _time(value / 1000)
    return f"{value:g}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{seconds * 1000:.3g} ms" if seconds >= 0.001 else f"{seconds * 1e6:.3g} us"


def drawn(curve: Curve, *, steps: bool, columns: int = CURVE_COLUMNS) -> str:
    """Return a curve as one line of bars, from its begin to its end."""
    end = curve[-1][0]
    values = [value_at(curve, end * (number + 0.5) / columns, steps=steps) for number in range(columns)]
    most = max(values)
    return "".join(_BARS[round(8 * value / most)] if most else _BARS[0] for value in values)


def mark_of(value: Any) -> str:
    """Return a value's mark in words; nothing of a value without one."""
    if not isinstance(value, Value):
        return ""
    if value.mark is not Mark.BOUNDED:
        return value.mark.value
    if value.lowest is not None and value.highest is not None:
        return "bounded"
    return "bounded: at most" if value.lowest is None else "bounded: at least"
