"""How dirty_bytes and stop_copy_length behave in time: a profile's kinds as functions of seconds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

from vfu_dev.profile import Curve, Profile, Value


def known(value: Value[float] | Value[int] | None) -> float:
    """Return a value, 0 for what is not known."""
    return 0 if value is None else value.value


def _integral(steps: Curve, seconds: float) -> float:
    """Return what rates that hold from step to step amount to; 0 before the first step."""
    total = 0.0
    for (begin, rate), end in zip(steps, [*(time for time, _ in steps[1:]), math.inf], strict=True):
        if seconds <= begin:
            break
        total += rate * (min(seconds, end) - begin)
    return total


def _on_curve(curve: Curve, seconds: float) -> float:
    """Return the value of a piecewise straight curve from (0, 0); of two points at one time the later."""
    at = bisect_right(curve, seconds, key=lambda point: point[0])
    if at == len(curve):
        return curve[-1][1]
    begin, low = curve[at - 1] if at else (0.0, 0.0)
    end, high = curve[at]
    return low + (high - low) * (seconds - begin) / (end - begin) if end > begin else low


class DirtyLaw:
    """dirty_bytes of one migration: `pending(seconds)` is asked in the order of time, `took` counts reads.

    Args: profile: as scaled.
    """

    def __init__(self, profile: Profile) -> None:
        self._dirty = profile.dirty
        limit = profile.dirty.limit_bytes
        self._limit = math.inf if limit is None else limit.value
        self._became = self.total(0.0)
        self._pending = min(self._limit, self._became)
        self._refilled = 0.0  # when

    def total(self, seconds: float) -> float:
        """Return the bytes that became dirty until then, nothing read or limited."""
        dirty = self._dirty
        match dirty.kind:
            case "rate":
                return known(dirty.bytes_per_second) * seconds
            case "steps" if dirty.steps is not None:
                steps = dirty.steps.value
                return self._onwards(steps[-1][0], seconds, lambda at: _integral(steps, at))
            case "curve" if dirty.curve is not None:
                curve = dirty.curve.value
                return self._onwards(curve[-1][0], seconds, lambda at: _on_curve(curve, at))
            case _:
                return 0.0

    def _onwards(self, last: float, seconds: float, law: Callable[[float], float]) -> float:
        """Return `law(seconds)`, after its last point as `after` says."""
        if seconds <= last:
            return law(seconds)
        after = "rate" if self._dirty.after is None else self._dirty.after.value
        whole = law(last)
        if after == "stop" or last <= 0:
            return whole
        if after == "repeat":
            rounds, rest = divmod(seconds, last)
            return whole * rounds + law(rest)
        return whole + whole / last * (seconds - last)

    def pending(self, seconds: float, *, all_read: bool) -> int:
        """Return dirty_bytes at a time in PRE_COPY.

        Args: all_read: no initial data is left, which a refill waits for.
        """
        if self._dirty.kind == "refill":
            due = self._refilled + known(self._dirty.refill_seconds)
            if all_read and self._pending < 1 and seconds >= due:
                self._pending = min(self._limit, known(self._dirty.refill_bytes))
                self._refilled = seconds
        else:
            became = self.total(seconds)
            self._pending = min(self._limit, self._pending + became - self._became)
            self._became = became
        return int(self._pending)

    def add(self, count: int) -> None:
        """Make `count` more bytes dirty: a REINIT that the client does not know of."""
        self._pending += count

    def took(self, count: int) -> None:
        """Note that `count` bytes were read."""
        self._pending -= count


def stop_copy_length(profile: Profile, seconds: float, left_bytes: int) -> int:
    """Return stop_copy_length at a time in PRE_COPY.

    Args: left_bytes: initial_bytes and dirty_bytes then.
    """
    law = profile.stop_copy
    match law.kind:
        case "constant":
            length = known(law.bytes)
        case "growing":
            length = known(law.bytes) + known(law.bytes_per_second) * seconds
        case "steps" if law.steps is not None:
            at = bisect_right(law.steps.value, seconds, key=lambda point: point[0])
            length = law.steps.value[max(0, at - 1)][1]
        case _:
            length = left_bytes + known(law.extra_bytes)
    if law.limit_bytes is not None:
        length = min(length, law.limit_bytes.value)
    return int(length)
