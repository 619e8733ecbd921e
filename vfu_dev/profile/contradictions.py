"""Finds what no device can do in a profile, and kinds that lack a value: all of it, for one error.

A bounded value contradicts another one only if no value within its bounds agrees with it. Unusual is no
contradiction: profiles are for devices whose sizes disagree.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vfu_dev.profile.kinds import keys_of
from vfu_dev.profile.model import Calls, Dirty, DmaLogging, Profile
from vfu_dev.profile.values import Mark, Value

# What a replay of a kind needs.
DIRTY_NEEDS = {
    "none": (),
    "rate": ("bytes_per_second",),
    "steps": ("steps",),
    "curve": ("curve",),
    "refill": ("refill_bytes", "refill_seconds"),
}
LENGTH_NEEDS = {
    "constant": ("bytes",),
    "following": ("extra_bytes",),
    "growing": ("bytes", "bytes_per_second"),
    "steps": ("steps",),
}
# Kinds with a last point, which `after` is about.
_WITH_AFTER = ("steps", "curve")


class Contradiction(NamedTuple):
    """The value of `key`, as in the file, contradicts another; `text` says which one, and what to do."""

    key: str
    text: str


def contradictions(profile: Profile) -> list[Contradiction]:
    """Return all contradictions in `profile`."""
    return [
        *_kind("dirty", profile.dirty, DIRTY_NEEDS),
        *_kind("stop_copy", profile.stop_copy, LENGTH_NEEDS),
        *_features(profile),
        *_after(profile.dirty),
        *_limits(profile),
        *_reinits(profile),
    ]


def _kind(at: str, table: Any, needs: Mapping[str, tuple[str, ...]]) -> Iterator[Contradiction]:
    """Yield what a table lacks for its kind, and what it has of another kind."""
    given = {name for names in needs.values() for name in names if getattr(table, name) is not None}
    if table.kind is None:
        for name in sorted(given):
            yield Contradiction(f"{at}.{name}", f"needs {at}.kind, one of {', '.join(needs)}")
        return
    for name in needs[table.kind]:
        if name not in given:
            yield Contradiction(f"{at}.kind", f"{table.kind} needs {at}.{name}")
    for name in sorted(given - set(needs[table.kind])):
        yield Contradiction(f"{at}.{name}", f"does not go with kind = {json.dumps(table.kind)}")


def _features(profile: Profile) -> Iterator[Contradiction]:
    """Yield what uses a feature that the device lacks."""
    features = profile.features
    arcs = [
        (f"arcs.{side}.{arc}", arc.split("->"))
        for side in ("source", "destination")
        for arc in getattr(profile, f"{side}_arcs")
    ]
    reinits = [f"reinit[{number}]" for number, _ in enumerate(profile.reinits, 1)]
    if _lacks(features.pre_copy):
        used = [key for key, ends in arcs if any(state.startswith("PRE_COPY") for state in ends)]
        if _least(profile.initial.bytes) > 0:
            used.append("initial.bytes")
        if profile.initial.ready_seconds is not None:
            used.append("initial.ready_seconds")
        if profile.dirty.kind not in (None, "none"):
            used.append("dirty.kind")
        if profile.stop_copy.kind == "growing":
            used.append("stop_copy.kind")
        phases = ("initial", "dirty")
        used += [f"reads.{phase}" for phase in phases if getattr(profile.reads, phase) != Calls()]
        yield from _without("pre_copy", "PRE_COPY", used + reinits)
    if _lacks(features.p2p):
        used = [key for key, ends in arcs if any(state.endswith("_P2P") for state in ends)]
        yield from _without("p2p", "P2P states", used)
    if _lacks(features.precopy_info_v2):
        yield from _without("precopy_info_v2", "REINIT", reinits)
    if _lacks(features.dma_logging):
        log = profile.dma_logging
        used = [f"dma_logging.{key}" for key in keys_of(DmaLogging) if getattr(log, key) is not None]
        yield from _without("dma_logging", "DMA logging", used)


def _without(feature: str, what: str, used: list[str]) -> Iterator[Contradiction]:
    for key in used:
        yield Contradiction(
            key,
            f"a device with features.{feature} = false has no {what}; "
            f"leave this out, or say features.{feature} = {{ assumed = true }}",
        )


def _after(dirty: Dirty) -> Iterator[Contradiction]:
    if dirty.after is not None and dirty.kind not in _WITH_AFTER:
        yield Contradiction(
            "dirty.after", f"goes with kind = {' or '.join(json.dumps(kind) for kind in _WITH_AFTER)} alone"
        )


def _limits(profile: Profile) -> Iterator[Contradiction]:
    """Yield what is more than its own limit."""
    dirty, stop_copy = profile.dirty, profile.stop_copy
    steps = Value.measured(max(one for _, one in stop_copy.steps.value)) if stop_copy.steps else None
    for key, value, by, limit in (
        ("dirty.refill_bytes", dirty.refill_bytes, "dirty.limit_bytes", dirty.limit_bytes),
        ("stop_copy.bytes", stop_copy.bytes, "stop_copy.limit_bytes", stop_copy.limit_bytes),
        ("stop_copy.steps", steps, "stop_copy.limit_bytes", stop_copy.limit_bytes),
    ):
        if _least(value) > _most(limit):
            yield Contradiction(
                key,
                f"{_least(value)} is more than {by}, {_most(limit)}; lower this or raise that",
            )


def _reinits(profile: Profile) -> Iterator[Contradiction]:
    for number, (before, after) in enumerate(itertools.pairwise(profile.reinits), 2):
        if _least(before.seconds) > _most(after.seconds):
            yield Contradiction(
                f"reinit[{number}].seconds", "is before that of the event before; put them in order of time"
            )


def _lacks(feature: Value[bool] | None) -> bool:
    return feature is not None and not feature.value


def _least(value: Value[Any] | None) -> Any:
    """Return the least that a value may be; 0: nothing is known."""
    if value is None:
        return 0
    known = value.lowest if value.mark is Mark.BOUNDED else value.value
    return 0 if known is None else known


def _most(value: Value[Any] | None) -> Any:
    """Return the most that a value may be; infinity: nothing is known."""
    known = None if value is None else value.highest if value.mark is Mark.BOUNDED else value.value
    return math.inf if known is None else known
