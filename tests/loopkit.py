"""What a profile that was replayed and imported again has to say: import(trace(replay(P))) beside P.

What a migration shows of a law (a rate, a jump) are samples: each lies between what the law says at the
sample before it and at its own time. That holds on a machine of any speed, because an answer is computed
between two events of whoever asks. So do lower bounds of times. Whether a time was kept is judged by `times`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vfu_dev.profile import Curve, Distribution, Mark, Profile, Value
from vfu_dev.profile.compare import Tolerance
from vfu_dev.profile.model import Calls, Phases
from vfu_dev.profile.session import PHASES, Phase
from vfu_dev.replay.laws import DirtyLaw, known, stop_copy_length
from vfu_dev.replay.session import whole_bytes

KEPT = Tolerance(size_part=0.05)
# A trace has microseconds, at both ends.
_GRAIN_SECONDS = 2e-6


@dataclass
class Comparison:
    """What a loop gave back.

    Attributes:
        compared: the keys, in order.
        different: key -> in what it is not what was replayed.
        late: key -> by how much a time is more than was asked for; only judged where `times` is.
    """

    compared: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)

    def holds(self, key: str, holds: bool, text: str) -> None:
        """Compare a key."""
        if key not in self.compared:
            self.compared.append(key)
        if not holds:
            self.different.setdefault(key, text)

    def same(self, key: str, found: object, asked: object) -> None:
        """Compare a value that has to be exact."""
        self.holds(key, found == asked, f"{found}, and {asked} was replayed")

    def time(self, key: str, found: float, asked: float, *, judged: bool) -> None:
        """Compare a measured time: never less than asked for; more only where the machine was too slow."""
        self.holds(
            key, found >= asked * 0.999 - _GRAIN_SECONDS, f"{found} s, less than the {asked} s replayed"
        )
        if judged and not KEPT.allows(found, asked, time=True):
            self.late.setdefault(key, f"{found * 1e3:.1f} ms instead of {asked * 1e3:.1f} ms")


def compare(
    profile: Profile, again: Profile, overshoot_bytes: int, *, times: bool, collected: bool = False
) -> Comparison:
    """Compare what is imported with what was replayed, in all that the import calls measured or bounded.

    Args:
        profile: as scaled.
        overshoot_bytes: by how much the replay says that it was longer than the profile.
        times: judge whether the machine kept the times.
        collected: writes return before the device has the data, so their times are not its (vfio-preload).
    """
    found = Comparison()
    for name in ("pre_copy", "p2p", "data_size", "precopy_info_v2"):
        asked, got = getattr(profile.features, name), getattr(again.features, name)
        if asked is not None and got is not None and got.mark is Mark.MEASURED:
            found.same(f"features.{name}", got.value, asked.value)
    initial = int(known(profile.initial.bytes))
    found.same("initial.bytes", again.initial.bytes, Value.measured(initial))
    if again.stop_copy.running_bytes is not None:
        found.same("stop_copy.running_bytes", again.stop_copy.running_bytes.value, whole_bytes(profile))
    entering = _path_seconds(again.source_arcs, "RUNNING->PRE_COPY") or 0.0
    _dirty(found, profile, again, entering)
    _length(found, profile, again, entering)
    _reinits(found, profile, again, entering)
    _totals(found, profile, again, overshoot_bytes)
    for phase in PHASES:
        _sizes(found, profile, again, phase)
        _call_times(found, "reads", phase, profile.reads, again.reads, judged=times)
    for side in ("source", "destination"):
        arcs, others = (getattr(one, f"{side}_arcs") for one in (profile, again))
        for name, value in arcs.items():
            key, took = f"arcs.{side}.{name}", _path_seconds(others, name)
            found.holds(key, took is not None, "is not in the trace")
            if took is not None:
                found.time(key, took, value.value.mean, judged=times)
    if (asked := profile.loading.initial_seconds) is not None and not collected:
        key, loading = "loading.initial_seconds", again.loading.initial_seconds
        found.holds(key, loading is not None, "is not in the trace")
        if loading is not None:
            found.time(key, loading.value, asked.value, judged=times and loading.mark is Mark.MEASURED)
    return found


def _path_seconds(arcs: Mapping[str, Value[Distribution]], name: str) -> float | None:
    """Return the mean time of an arc, or of those that a client with P2P goes along in its place."""
    origin, _, target = name.partition("->")
    seconds, at = 0.0, origin
    for _ in range(3):
        for arc in (f"{at}->{target}", *(one for one in arcs if one.startswith(f"{at}->"))):
            if arc in arcs:
                seconds += arcs[arc].value.mean
                at = arc.partition("->")[2]
                break
        if at == target:
            return seconds
    return None


def _between(found: Comparison, key: str, curve: Curve, least: list[float], most: list[float]) -> None:
    """Compare samples with what each can be at least and at most; bytes are whole."""
    for (at, value), low, high in zip(curve, least, most, strict=True):
        fits = low - 1 <= value <= high + 1
        found.holds(key, fits, f"{value:.0f} bytes at {at} s, {low:.0f} to {high:.0f} were replayed")


def _dirty(found: Comparison, profile: Profile, again: Profile, entering: float) -> None:
    kind, key = profile.dirty.kind or "none", "dirty"
    if kind == "none":
        found.same(key, again.dirty.kind, "none")
        return
    curve = again.dirty.curve
    found.holds(key, curve is not None, f"is {again.dirty.kind}, not a curve")
    if curve is None:
        return
    points = curve.value
    grown = points[-1][1]
    if kind == "refill":
        whole = known(profile.dirty.refill_bytes)
        jumps = {value % whole for _, value in points}
        found.holds(key, jumps == {0}, f"jumps by {jumps} besides whole refills of {whole} bytes")
        found.holds(key, grown >= whole, "has no refill")
        return
    limit = math.inf if profile.dirty.limit_bytes is None else profile.dirty.limit_bytes.value
    law = DirtyLaw(profile)
    before = [0.0, *(at for at, _ in points[:-1])]
    _between(
        found,
        key,
        points,
        [min(limit, law.total(at)) for at in before],
        [law.total(at + entering) for at, _ in points],
    )
    found.holds(key, grown > 0, "nothing became dirty")


def _length(found: Comparison, profile: Profile, again: Profile, entering: float) -> None:
    asked, got, key = profile.stop_copy, again.stop_copy, "stop_copy"
    kind = asked.kind or "following"
    if kind == "constant":
        found.same(key, (got.kind, got.bytes), (kind, Value.measured(stop_copy_length(profile, 0.0, 0))))
    elif kind == "following":
        extra, said = int(known(asked.extra_bytes)), got.extra_bytes
        if got.kind == "constant" and profile.dirty.limit_bytes is not None:
            # All that there can be was dirty each time: nothing shows that the length follows it.
            found.same(key, got.bytes, Value.measured(profile.dirty.limit_bytes.value + extra))
            return
        if got.kind == "steps" and got.steps is not None:
            # Too much became dirty between two answers to see it: a busy machine.
            law, initial = DirtyLaw(profile), whole_bytes(profile)
            initial += sum(int(known(one.bytes)) for one in profile.reinits)
            points = got.steps.value
            most = [initial + law.total(at + entering) + extra for at, _ in points]
            _between(found, key, points, [extra] * len(points), most)
            return
        found.same(key, got.kind, kind)
        if said is not None and said.mark is Mark.MEASURED:
            found.same(key, said.value, extra)
        elif said is not None:
            # The length is asked for first: what becomes dirty until the other answer is in that one alone.
            found.holds(
                key,
                (said.lowest or 0) <= extra <= (said.highest or 0),
                f"exceeds what is left by {said.lowest} to {said.highest}, not {extra} bytes",
            )
    elif got.kind == "steps" and got.steps is not None:
        points = got.steps.value
        before = [0.0, *(at for at, _ in points[:-1])]
        lengths = [[stop_copy_length(profile, at, 0) for at in (early, late + entering)]
                   for early, (late, _) in zip(before, points, strict=True)]  # fmt: skip
        _between(found, key, points, [min(one) for one in lengths], [max(one) for one in lengths])
    elif kind == "steps" and asked.steps is not None and got.kind == "constant":
        # It was asked for after the last jump only: a busy machine.
        found.holds(key, known(got.bytes) == asked.steps.value[-1][1], f"is {known(got.bytes)} all the time")
    else:
        found.holds(key, False, f"is {got.kind}, and {kind} was replayed")


def _reinits(found: Comparison, profile: Profile, again: Profile, entering: float) -> None:
    if not profile.reinits:
        found.same("reinit", again.reinits, ())
        return
    found.same("reinit", len(again.reinits), len(profile.reinits))
    for asked, got in zip(profile.reinits, again.reinits, strict=False):
        assert got.seconds is not None
        assert got.bytes is not None
        if got.bytes.mark is Mark.BOUNDED:  # other data was read since the last answer
            least, most, size = got.bytes.lowest or 0, got.bytes.highest or 0, known(asked.bytes)
            found.holds("reinit.bytes", least <= size <= most, f"{least} to {most} bytes, not {size}")
        else:
            found.same("reinit.bytes", got.bytes.value, known(asked.bytes))
        low, high, at = got.seconds.lowest or 0.0, got.seconds.highest, known(asked.seconds)
        fits = low - _GRAIN_SECONDS <= at and (high is None or at <= high + entering + _GRAIN_SECONDS)
        found.holds("reinit.seconds", fits, f"between {low} and {high} s, and {at} s was replayed")


def _totals(found: Comparison, profile: Profile, again: Profile, overshoot_bytes: int) -> None:
    """Compare what was read in STOP_COPY in all."""
    read, asked, key = again.recorded.stop_copy_bytes, profile.stop_copy, "recorded.stop_copy_bytes"
    if read is None:
        return
    still = profile.dirty.kind in (None, "none")
    if asked.carried_bytes is not None:
        found.same(key, read, asked.carried_bytes.value + overshoot_bytes)
    elif asked.kind == "constant" or (still and asked.kind in (None, "following")):
        found.same(key, read, stop_copy_length(profile, 0.0, 0) + overshoot_bytes)
    else:
        least = stop_copy_length(profile, again.recorded.precopy_seconds or 0.0, 0)
        if asked.kind != "steps":
            found.holds(key, read >= least, f"{read} bytes, at least {least} were replayed")


def _sizes(found: Comparison, profile: Profile, again: Profile, phase: Phase) -> None:
    """Compare the bytes of reads of one phase, of a profile whose reads have one size."""
    calls: Calls = getattr(again.reads, phase)
    asked: Calls = getattr(profile.reads, phase)
    key = f"reads.{phase}.bytes"
    initial = int(known(profile.initial.bytes)) + sum(int(known(one.bytes)) for one in profile.reinits)
    total = 0 if calls.bytes is None else calls.bytes.value.total
    if phase == "initial":
        found.same(key, total, initial)
    elif phase == "dirty":
        found.same(key, total, (again.recorded.precopy_bytes or 0) - initial)
    else:
        found.same(key, total, again.recorded.stop_copy_bytes)
    if calls.bytes is None or again.reads.buffer_bytes is None:
        return
    buffer = again.reads.buffer_bytes.value
    sizes = calls.bytes.value
    one = buffer if asked.bytes is None else min(buffer, int(asked.bytes.value.highest))
    # The last reads of STOP_COPY take what is left together with the device's own state.
    if phase != "stop_copy":
        found.holds(key, sizes.highest <= one, f"a read of {sizes.highest:.0f} bytes, more than {one}")
    if total >= 4 * one and phase != "dirty":
        found.same(key, sizes.quantile(0.5), one)
        found.holds(key, sizes.count <= total / one + 3, f"{sizes.count} reads for {total:.0f} bytes")


def _call_times(
    found: Comparison, name: str, phase: Phase, asked: Phases, again: Phases, *, judged: bool
) -> None:
    """Compare what calls took: each at least what is asked for, where it is bounded too."""
    one: Calls = getattr(asked, phase)
    other: Calls = getattr(again, phase)
    if one.seconds is not None and other.seconds is not None:
        key, got = f"{name}.{phase}.seconds", other.seconds
        found.time(key, got.value.lowest, one.seconds.value.lowest, judged=False)
        found.time(key, got.value.mean, one.seconds.value.mean, judged=judged and got.mark is Mark.MEASURED)
    if other.first_seconds is not None:
        first = one.first_seconds
        least = known(first) if first is not None else one.seconds.value.lowest if one.seconds else 0.0
        if least:
            found.time(f"{name}.{phase}.first_seconds", other.first_seconds.value, least, judged=False)
