"""A profile from what was observed: each value with its mark, and none that was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vfu_dev.profile.history import MAX_EXTRAS, History
from vfu_dev.profile.kinds import MAX_BYTES
from vfu_dev.profile.model import (
    Calls,
    Dirty,
    DmaLogging,
    Features,
    Initial,
    Loading,
    MigrationSettings,
    Phases,
    Profile,
    Reads,
    Recorded,
    Reinit,
    StopCopy,
)
from vfu_dev.profile.session import ArcTally, CallTallies, CallTally, Outgoing
from vfu_dev.profile.tally import Tally
from vfu_dev.profile.values import Curve, Distribution, Value
from vfu_dev.uapi import DeviceState, MigrationFlags

# A length follows what is left if their difference hardly varies. It may vary by the largest of three: the
# first part of the length, the second of what the length varies by, what becomes dirty between two questions.
FOLLOWS_PART, MOVES_PART, BETWEEN_SECONDS = 0.01, 0.1, 0.1
P2P = (DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P)


@dataclass
class Observed:
    """What is known of a device.

    Attributes:
        source, destination: None where that side was not seen.
        format: one of `model.TRACE_FORMATS`.
        ranges: how many ranges of DMA logging were asked for, 0: not seen. ranges_refused: fewer than this.
        times_of_dma: how long DMA_LOGGING_START and _REPORT took.
        notes: for the user: what was noticed on the way.
    """

    format: str
    source: History | None = None
    destination: History | None = None
    timed: bool = True
    ranges: int = 0
    ranges_refused: int | None = None
    start_times: Tally = field(default_factory=lambda: Tally(whole=False))
    report_times: Tally = field(default_factory=lambda: Tally(whole=False))
    notes: list[str] = field(default_factory=list)


def build(observed: Observed, name: str, migration: MigrationSettings, about: str | None = None) -> Profile:
    """Return the profile; adds to `observed.notes` what a user has to know of it."""
    source, destination = observed.source, observed.destination
    one = source.kept if source is not None else None
    sides = [word for word, side in (("source", source), ("destination", destination)) if side is not None]
    what = {"log": "QEMU's log", "simple": "QEMU's simple trace", "calls": "vfu-dev profile record"}[
        observed.format
    ]
    features = _features(observed)
    return Profile(
        name=name,
        origin="recorded",
        source=f"{what}, {' and '.join(sides)}",
        about=about,
        features=features,
        initial=_initial(one),
        dirty=_dirty(one, observed),
        stop_copy=_stop_copy(source, one, observed),
        reads=_reads(source),
        writes=_phases(
            destination.writes if destination is not None else None, pieces=observed.format != "calls"
        ),
        source_arcs=_arcs(source, "source"),
        destination_arcs=_arcs(destination, "destination"),
        loading=_loading(destination),
        reinits=_reinits(one),
        dma_logging=_dma_logging(observed, features),
        migration=migration,
        recorded=_recorded(observed, one),
    )


def _features(observed: Observed) -> Features:
    sides = [side for side in (observed.source, observed.destination) if side is not None]
    logging = Value.measured(True) if observed.ranges else None
    # Whatever the device announced, and when.
    told = Value.measured(True) if any(side.reinit_told for side in sides) else None
    if announced := next((side.announced for side in sides if side.announced is not None), None):
        flags = announced.flags
        return Features(
            Value.measured(MigrationFlags.VFIO_MIGRATION_PRE_COPY in flags),
            Value.measured(MigrationFlags.VFIO_MIGRATION_P2P in flags),
            _data_size(observed.source),
            told or Value.measured(announced.reinit),
            logging if announced.dma_logging is None else Value.measured(announced.dma_logging),
        )
    states = {state for side in sides for state in side.states}
    pre_copy = p2p = None
    if DeviceState.PRE_COPY in states:
        pre_copy = Value.measured(True)
    elif any(side.without_precopy for side in sides):
        pre_copy = Value.measured(False)
    if states & set(P2P):
        p2p = Value.measured(True)
    elif any(side.counts["completed"] + side.counts["arrived"] for side in sides):
        # QEMU goes through the P2P states wherever there are any.
        p2p = Value.measured(False)
    return Features(pre_copy, p2p, _data_size(observed.source), told, logging)


def _data_size(source: History | None) -> Value[bool] | None:
    if source is None or source.says_size is None:
        return None
    return (Value.measured if source.says_size_measured else Value.assumed)(source.says_size)


def _initial(one: Outgoing | None) -> Initial:
    if one is None or one.initial is None:
        return Initial()
    ready = None
    if one.empty_with_initial and one.first_read_at is not None and one.precopy_at is not None:
        ready = Value.bounded(at_most=round(max(0.0, one.first_read_at - one.precopy_at), 6))
    return Initial(Value.measured(one.initial), ready)


def _dirty(one: Outgoing | None, observed: Observed) -> Dirty:
    if one is None or one.initial is None:
        return Dirty()
    if not one.dirtied_most:
        return Dirty(kind="none")
    if len(one.dirtied) < 2:
        observed.notes.append(
            f"{one.dirtied_last:.0f} bytes became dirty; it is not known when, so dirty is left out"
        )
        return Dirty()
    return Dirty(kind="curve", curve=Value.measured(_rounded(one.dirtied.curve())))


def _rounded(curve: Curve) -> Curve:
    """Return a curve of whole bytes and microseconds, which is what a trace has."""
    return tuple((round(at, 6), min(round(value), MAX_BYTES)) for at, value in curve)


def _stop_copy(source: History | None, one: Outgoing | None, observed: Observed) -> StopCopy:
    if source is None or one is None:
        return StopCopy()
    running = None if source.running_length is None else Value.measured(source.running_length)
    carried = one.stop_copy_bytes if one.completed and not one.unseen else None
    found = StopCopy(running_bytes=running)
    if one.length_range is not None:
        found = replace(_length(one, one.length_range), running_bytes=running)
        if one.lengths_seen == 1:
            observed.notes.append("stop_copy_length was asked for once: how it changes is not known")
    if carried is None or (found.extra_bytes is not None and carried >= (found.extra_bytes.lowest or 0)):
        return found  # what became dirty until the stop is not known, so nothing contradicts the length
    said = found.bytes.value if found.bytes is not None else found.steps.value[-1][1] if found.steps else None
    return found if said == carried else replace(found, carried_bytes=Value.measured(carried))


def _length(one: Outgoing, lengths: tuple[int, int]) -> StopCopy:
    low, high = lengths
    if low == high and one.lengths_seen > 1:
        return StopCopy(kind="constant", bytes=Value.measured(low))
    if (extra := _extra(one, low, high)) is not None and (one.lengths_seen > 1 or min(one.extras) < low):
        return StopCopy(kind="following", extra_bytes=extra)
    if low == high:
        return StopCopy(kind="constant", bytes=Value.measured(low))
    if len(one.lengths) < 2:  # no times
        return StopCopy(kind="constant", bytes=Value.bounded(at_least=low, at_most=high))
    return StopCopy(kind="steps", steps=Value.measured(_rounded(one.lengths.curve())))


def _extra(one: Outgoing, low: int, high: int) -> Value[int] | None:
    """Return by how much the length exceeds what is left, if it follows it.

    The length is asked for first, and what becomes dirty until the other answer is in that one alone. Most of
    the time nothing does. Else each difference is too low, by no more than what became dirty.
    """
    extra, times = max(one.extras.items(), key=lambda item: item[1])
    least, most = min(one.extras), max(one.extras)
    # Whatever else makes a difference is a length that goes its own way, such as one that jumps.
    explained = most == extra and extra - least <= one.dirtied_most + one.reinit_bytes
    highest = max(most, round(one.extra_most or 0))
    sure = times > 1 or highest == extra
    if extra >= 0 and times > one.lengths_seen / 2 and explained and sure:
        return Value.measured(extra)
    end = one.dirtied.end_seconds
    between = one.dirtied_last / end * BETWEEN_SECONDS if end else 0.0
    allowed = max(FOLLOWS_PART * high, MOVES_PART * (high - low), between)
    if most - least > allowed or most < -allowed or len(one.extras) >= MAX_EXTRAS:
        return None
    return Value.bounded(at_least=max(0, least), at_most=max(0, highest))


def _reads(source: History | None) -> Reads:
    if source is None:
        return Reads()
    phases = _phases(source.reads)
    buffer = Value.measured(source.buffer_bytes) if source.buffer_bytes else None
    return Reads(phases.initial, phases.dirty, phases.stop_copy, buffer)


def _phases(calls: CallTallies | None, *, pieces: bool = False) -> Phases:
    """Return calls by phase; `pieces`: what was seen as one may be several calls."""
    if calls is None:
        return Phases()
    return Phases(*(_calls(one, pieces=pieces) for one in calls.phases.values()))


def _calls(one: CallTally, *, pieces: bool) -> Calls:
    sizes, first = one.sizes.distribution(), one.firsts.distribution()
    return Calls(
        None if sizes is None else _spread(sizes, exact=not pieces),
        None if (times := one.times.distribution()) is None else _spread(times, exact=one.exact),
        None
        if first is None
        else Value.measured(first.mean)
        if one.exact
        else Value.bounded(at_most=first.highest),
    )


def _spread(found: Distribution, *, exact: bool) -> Value[Distribution]:
    return Value.measured(found) if exact else Value.bounded(at_most=found)


def _arcs(side: History | None, which: str) -> Mapping[str, Value[Distribution]]:
    arcs: Mapping[str, ArcTally] = side.arcs[which] if side is not None else {}
    found = {name: (arc.times.distribution(), arc.exact) for name, arc in arcs.items()}
    return {name: _spread(times, exact=exact) for name, (times, exact) in found.items() if times is not None}


def _loading(destination: History | None) -> Loading:
    one = destination.kept_incoming if destination is not None else None
    if one is None or one.last_initial is None or one.last_initial.seconds is None:
        return Loading()
    exact, seconds = one.last_initial.exact, one.last_initial.seconds
    return Loading(Value.measured(seconds) if exact else Value.bounded(at_most=seconds))


def _reinits(one: Outgoing | None) -> tuple[Reinit, ...]:
    found = []
    for event in one.reinits if one is not None else ():
        if one is None or event.after is None or event.before is None or one.precopy_at is None:
            continue
        begin, end = (round(max(0.0, at - one.precopy_at), 6) for at in (event.after, event.before))
        size = Value.measured(event.least)
        if event.least != event.most:
            size = Value.bounded(at_least=event.least, at_most=event.most)
        found.append(Reinit(Value.bounded(at_least=min(begin, end), at_most=end), size))
    return tuple(found)


def _dma_logging(observed: Observed, features: Features) -> DmaLogging:
    if features.dma_logging == Value.measured(False):
        return DmaLogging()  # what the trace has is another device's: its event names none
    ranges: Value[int] | None = None
    if observed.ranges_refused is not None:
        ranges = Value.bounded(at_least=observed.ranges or None, at_most=observed.ranges_refused - 1)
    elif observed.ranges:
        ranges = Value.bounded(at_least=observed.ranges)
    start, report = observed.start_times.distribution(), observed.report_times.distribution()
    return DmaLogging(
        ranges,
        None if start is None else Value.measured(start),
        None if report is None else Value.measured(report),
    )


def _recorded(observed: Observed, one: Outgoing | None) -> Recorded:
    source, destination = observed.source, observed.destination
    known = source if source is not None else destination
    assert known is not None
    way, done = ("outgoing", "completed") if source is not None else ("incoming", "arrived")
    ends = [side for side in (source, destination) if side is not None]
    spans: tuple[float | None, float | None] = (None, None)
    if one is not None:
        spans = (_span(one.precopy_at, one.stopping_at), _span(one.stopping_at, one.read_out_at))
    return Recorded(
        format=observed.format,
        source=source is not None,
        destination=destination is not None,
        timestamps=observed.timed,
        migrations=known.counts[way],
        completed=known.counts[done],
        cut_off=any(side.cut_off for side in ends) or (one is not None and not one.whole),
        precopy_seconds=spans[0],
        precopy_bytes=None if one is None else one.precopy_bytes,
        stop_seconds=spans[1],
        stop_copy_bytes=None if one is None or one.unseen else one.stop_copy_bytes,
    )


def _span(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round(max(0.0, end - begin), 6)
