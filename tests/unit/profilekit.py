"""Any profile there is, for hypothesis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from vfu_dev.profile import Distribution, Profile, Value
from vfu_dev.profile.contradictions import DIRTY_NEEDS, LENGTH_NEEDS, contradictions
from vfu_dev.profile.kinds import CurveKind, Flag, Kind, Number, Spread, Text, WordList, Words, keys_of
from vfu_dev.profile.model import DIRTY_KINDS, LENGTH_KINDS, Calls, Reads, Reinit
from vfu_dev.profile.reading import PHASES, TABLES


def _numbers(kind: Number) -> st.SearchStrategy[Any]:
    if kind.whole:
        return st.integers(0, int(kind.highest))
    return st.floats(0, kind.highest, allow_nan=False).map(abs)


def of_kind(kind: Kind) -> st.SearchStrategy[Any]:
    """Return a strategy for the values of a kind."""
    match kind:
        case Flag():
            return st.booleans()
        case Number():
            return _numbers(kind)
        case Words():
            return st.sampled_from(kind.words)
        case WordList():
            return st.lists(st.sampled_from(kind.words), unique=True).map(tuple)
        case Text():
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
        case Spread():
            values = st.lists(_numbers(kind.each), min_size=1, max_size=5, unique=True).map(sorted)
            return values.map(lambda found: Distribution(tuple((one, 1 + n) for n, one in enumerate(found))))
        case CurveKind():
            times = st.lists(st.floats(0, 86400).map(abs), min_size=1, max_size=5).map(sorted)
            return times.flatmap(
                lambda found: st.tuples(*(st.tuples(st.just(at), _numbers(kind.each)) for at in found))
            )
    raise AssertionError(kind)


@st.composite
def marked_values(draw: st.DrawFn, kind: Kind) -> Value[Any]:
    value = draw(of_kind(kind))
    ways = [Value.measured, Value.assumed]
    if kind.ordered:
        ways += [lambda one: Value.bounded(at_most=one), lambda one: Value.bounded(at_least=one)]
        ways.append(lambda one: Value.bounded(at_least=one, at_most=one))
    return draw(st.sampled_from(ways))(value)


@st.composite
def members(
    draw: st.DrawFn, cls: Any, need: tuple[str, ...] = (), leave: tuple[str, ...] = ()
) -> dict[str, Any]:
    found = {}
    for name, key in keys_of(cls).items():
        if name not in leave and (name in need or draw(st.booleans())):
            found[name] = draw(marked_values(key.kind) if key.marked else of_kind(key.kind))
    return found


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    tables = {}
    for name, cls in TABLES.items():
        more, need, leave = {}, (), ()
        for table, kinds, needs in (
            ("dirty", DIRTY_KINDS, DIRTY_NEEDS),
            ("stop_copy", LENGTH_KINDS, LENGTH_NEEDS),
        ):
            if name == table:
                kind = draw(st.sampled_from(kinds.words))
                every = {one for found in needs.values() for one in found}
                more, need, leave = {"kind": kind}, needs[kind], ("kind", *(every - set(needs[kind])))
        if name in ("reads", "writes"):
            more = {phase: Calls(**draw(members(Calls))) for phase in PHASES}
        tables[name] = cls(**{**draw(members(cls, need, leave)), **more})
    key = keys_of(Calls)["seconds"].kind
    arcs = st.dictionaries(st.sampled_from(["RUNNING->PRE_COPY", "RESUMING->RUNNING"]), marked_values(key))
    reinit = members(Reinit, ("seconds", "bytes")).map(lambda found: Reinit(**found))
    return agreeing(
        Profile(
            **draw(members(Profile)),
            **tables,
            source_arcs=draw(arcs),
            destination_arcs=draw(arcs),
            reinits=tuple(draw(st.lists(reinit, max_size=3))),
        )
    )


def agreeing(profile: Profile) -> Profile:
    """Return a profile without what contradicts something else in it."""
    for one in contradictions(profile):
        table, _, key = one.key.partition(".")
        if table.startswith(("reinit", "arcs")):
            profile = replace(profile, reinits=(), source_arcs={}, destination_arcs={})
        elif table == "reads":
            profile = replace(profile, reads=Reads())
        elif key == "after":
            profile = replace(profile, dirty=replace(profile.dirty, after=None))
        else:
            profile = replace(profile, **{table: TABLES[table]()})
    return profile
