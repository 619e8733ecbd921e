"""A profile with all sizes and rates divided by a number: the same shape and times, with fewer bytes."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from vfu_dev.errors import ConfigError, shown
from vfu_dev.profile import Distribution, Profile, Value
from vfu_dev.profile.kinds import BYTES, BYTES_CURVE, BYTES_SPREAD, MAX_BYTES, RATE, RATE_CURVE, Kind, keys_of
from vfu_dev.profile.session import PHASES

_SIZES: tuple[Kind, ...] = (BYTES, BYTES_CURVE, BYTES_SPREAD)
_RATES: tuple[Kind, ...] = (RATE, RATE_CURVE)
T = TypeVar("T")


def scaled(profile: Profile, scale: int) -> Profile:
    """Return the profile with sizes and rates divided by `scale`; bytes are rounded up.

    What is 0 stays 0. `[recorded]` stays as it is, and of `[migration]` the bandwidth is divided.
    Raises: ConfigError: `scale` is below 1, or more than any size.
    """
    if not 1 <= scale <= MAX_BYTES:
        raise ConfigError(f"scale {shown(scale)}: expected 1 to {MAX_BYTES}")
    if scale == 1:
        return profile
    changed: dict[str, Any] = {
        name: _scaled(getattr(profile, name), scale)
        for name in ("initial", "dirty", "stop_copy", "reads", "writes")
    }
    for name in ("reads", "writes"):
        calls = getattr(profile, name)
        phases = {phase: _scaled(getattr(calls, phase), scale) for phase in PHASES}
        changed[name] = dataclasses.replace(changed[name], **phases)
    changed["reinits"] = tuple(_scaled(event, scale) for event in profile.reinits)
    if (bandwidth := profile.migration.max_bandwidth) is not None:
        changed["migration"] = dataclasses.replace(profile.migration, max_bandwidth=-(-bandwidth // scale))
    return dataclasses.replace(profile, **changed)


def _scaled(table: T, scale: int) -> T:
    """Return a table of a profile with what is a size or a rate divided."""
    changed: dict[str, Any] = {}
    cls: Any = type(table)
    for name, key in keys_of(cls).items():
        value = getattr(table, name)
        if not isinstance(value, Value):
            continue
        if key.kind in _SIZES:
            changed[name] = _each(value, lambda size: -(-int(size) // scale))
        elif key.kind in _RATES:
            changed[name] = _each(value, lambda rate: rate / scale)
    return dataclasses.replace(table, **changed)  # type: ignore[type-var]


def _each(value: Value[Any], divide: Any) -> Value[Any]:
    def one(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, Distribution):
            counts: dict[float, int] = {}
            for point, count in part.points:
                counts[divide(point)] = counts.get(divide(point), 0) + count
            return Distribution(tuple(sorted(counts.items())))
        if isinstance(part, tuple):
            return tuple((time, divide(point)) for time, point in part)
        return divide(part)

    return Value(one(value.value), value.mark, one(value.lowest), one(value.highest))
