"""The times of a replay: a layer around a device's callbacks, in which each call takes what the profile says.

A recorded call limits the time of others. One of fewer bytes takes no longer: what part of its time each byte
has is not known, so the whole is kept. One of more bytes takes no longer than several recorded ones.

A call that took longer by itself is late: this machine cannot keep the profile. `Pace` counts such calls.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfu_dev.errors import StateError
from vfu_dev.libvfio_user import DeviceCallbacks
from vfu_dev.memory.kernels import Vectors
from vfu_dev.migration.engine import Migration
from vfu_dev.migration.fsm import SAVING_GROUP, Action, TransitionError
from vfu_dev.profile import Distribution, Profile, Value
from vfu_dev.profile.model import Calls
from vfu_dev.profile.session import PHASES, Phase
from vfu_dev.replay.contention import SharedResource, lock_path
from vfu_dev.replay.draw import Draw, draw_of
from vfu_dev.replay.laws import known
from vfu_dev.replay.session import ReplaySessions
from vfu_dev.uapi import DeviceState

# A wait's last part sleeps in this thread: the loop's own waits are as coarse as a millisecond.
_FINE_SECONDS = 0.0015
# Between two tries to get a shared resource.
_TRY_SECONDS = 0.001
# What counts as late: more than both.
LATE_PART = 0.1
LATE_SECONDS = 0.002

Hold = Callable[[float | None, Callable[[], bool]], None]


class UnavailableError(StateError):
    """The profile's device does not have this; `errno` is in the reply to the client."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"the profile's device {what}")
        self.errno = number


@dataclass
class Pace:
    """What became of the times of a replay.

    Attributes:
        calls: how many had a time to keep.
        late_calls: how many took longer, by more than a tenth and by more than 2 ms.
        late_seconds: by how much, in all.
        waited_seconds: for resources that other devices held.
    """

    calls: int = 0
    late_calls: int = 0
    late_seconds: float = 0.0
    waited_seconds: float = 0.0


def more_seconds(calls: Calls, count: int) -> float:
    """Return what a call of `count` bytes takes beyond one recorded call: further ones for the rest."""
    if calls.bytes is None or calls.seconds is None:
        return 0.0
    return max(0.0, count / max(1.0, calls.bytes.value.highest) - 1.0) * calls.seconds.value.mean


class _Arc:
    """An arc of a profile as this device goes along it."""

    def __init__(self, text: str, value: Value[Distribution]) -> None:
        origin, _, target = text.partition("->")
        self.origin, self.target = DeviceState[origin], DeviceState[target]
        self.draw = Draw(value.value)


class PacedCallbacks:
    """Stands around `next_`, a served device's callbacks.

    Args:
        sessions: the device's, of the same profile.
        hold: lets the client wait, and serves all others meanwhile.
    """

    def __init__(
        self,
        profile: Profile,
        sessions: ReplaySessions,
        migration: Migration,
        hold: Hold,
        next_: DeviceCallbacks,
    ) -> None:
        self.pace = Pace()
        self.next = next_
        self._profile = profile
        self._sessions = sessions
        self._migration = migration
        self._hold = hold
        self._arcs = {
            side: [_Arc(text, value) for text, value in arcs.items()]
            for side, arcs in (("source", profile.source_arcs), ("destination", profile.destination_arcs))
        }
        self._sides = ("source", "destination")  # the likelier one first
        self._route: list[DeviceState] = []  # the rest of the arcs whose time has passed already
        self._draws = {
            (operation, phase): draw_of(getattr(phases, phase).seconds)
            for operation, phases in (("read", profile.reads), ("write", profile.writes))
            for phase in PHASES
        }
        self._first: set[tuple[str, str]] = set()  # operations and phases of this session that had a call
        self._held = known(profile.contention.part)
        name = profile.contention.resource
        self._resource = SharedResource(lock_path(name)) if name and self._held else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.next, name)

    # --- time ---------------------------------------------------------------------------------------------

    def _paced(self, operation: str, began: float, seconds: float) -> None:
        """Return when an operation that began then has taken its time; what others hold it up is on top."""
        if not seconds:
            return
        self.pace.calls += 1
        if self._resource is not None and operation in self._profile.contention.operations:
            waited = self._await(self._resource)
            self.pace.waited_seconds += waited
            began += waited
            try:
                self._wait(began + seconds * self._held - time.monotonic())
            finally:
                self._resource.give()
        late = time.monotonic() - began - seconds
        if late > max(LATE_SECONDS, LATE_PART * seconds):
            self.pace.late_calls += 1
            self.pace.late_seconds += late
        self._wait(-late)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if seconds > 2 * _FINE_SECONDS:
            self._hold(seconds - _FINE_SECONDS, lambda: False)
        # More than the last part is left where nobody waits: the client hung up, or the server is to end.
        if 0 < (left := until - time.monotonic()) <= 2 * _FINE_SECONDS:
            time.sleep(left)

    def _await(self, resource: SharedResource) -> float:
        """Take the resource, or return without it where nobody waits for this call any more.

        Returns the seconds for which somebody else had it: exactly 0 where it was free.
        """
        if resource.take():
            return 0.0
        asked, taken = time.monotonic(), False

        def over() -> bool:
            nonlocal taken
            taken = taken or resource.take()
            return taken

        until = 0.0
        while not over() and time.monotonic() >= until:
            until = time.monotonic() + _TRY_SECONDS  # `hold` returns before it if nobody waits
            self._hold(_TRY_SECONDS, over)
        return time.monotonic() - asked

    def _call_seconds(self, operation: str, phase: Phase, count: int) -> float:
        """Return how long a call of `count` bytes takes; the first of a phase may have a time of its own."""
        calls: Calls = getattr(self._profile.reads if operation == "read" else self._profile.writes, phase)
        draw = self._draws[operation, phase]
        first = (operation, phase) not in self._first
        self._first.add((operation, phase))
        own = first and calls.first_seconds is not None
        seconds = known(calls.first_seconds) if own else draw() if draw is not None else 0.0
        return seconds + more_seconds(calls, count)

    # --- callbacks ----------------------------------------------------------------------------------------

    def arc(self, target: DeviceState) -> None:
        """Go along an arc in its time. A path of several arcs takes it on the first one."""
        began, origin = time.monotonic(), self._migration.state
        self.next.arc(target)
        action = self._migration.machine.action(origin, target)
        if action in (Action.BEGIN_SAVE, Action.BEGIN_RESUME):
            self._first.clear()
        if self._route and self._route[0] is target:
            del self._route[0]
            return
        self._route = []
        self._paced("arc", began, self._arc_seconds(origin, target))
        if action is Action.BEGIN_SAVE and self._sessions.saving is not None:
            self._sessions.saving.began = time.monotonic()

    def _arc_seconds(self, origin: DeviceState, target: DeviceState) -> float:
        """Return an arc's time; of the side that this device was last on, if the profile has it there."""
        if DeviceState.RESUMING in (origin, target):
            self._sides = ("destination", "source")
        elif SAVING_GROUP & {origin, target}:
            self._sides = ("source", "destination")
        for side in self._sides:
            for one in self._arcs[side]:
                if one.origin is not origin:
                    continue
                try:
                    route = self._migration.machine.path(origin, one.target)
                except TransitionError:
                    continue
                if route and route[0] is target:
                    self._route = route[1:]
                    return one.draw()
        return 0.0

    def _before_read(self) -> tuple[float, Phase, int]:
        saving, overshot = self._sessions.saving, self._sessions.overshoot_bytes
        if saving is None:
            return time.monotonic(), "dirty", overshot
        return time.monotonic(), saving.phase, overshot

    def _after_read(self, before: tuple[float, Phase, int], stored: int) -> None:
        began, phase, overshot = before
        # The profile's device has no bytes beyond the profile's: they take no time, nor does a read of them.
        count = stored - (self._sessions.overshoot_bytes - overshot)
        if count:
            self._paced("read", began, self._call_seconds("read", phase, count))

    def read_into(self, buffer: memoryview) -> int:
        """Serve MIG_DATA_READ in its time."""
        before = self._before_read()
        stored = self.next.read_into(buffer)
        self._after_read(before, stored)
        return stored

    def gather(self, count: int) -> Vectors | None:
        """Serve MIG_DATA_READ in its time, without a copy."""
        before = self._before_read()
        vectors = self.next.gather(count)
        if vectors is not None:
            self._after_read(before, int(vectors[:, 1].sum()))
        return vectors

    def write(self, data: memoryview) -> None:
        """Serve MIG_DATA_WRITE in its time."""
        began, receiving = time.monotonic(), self._sessions.receiving
        ends, own = (0, 0) if receiving is None else (receiving.initial_ends, receiving.own_bytes)
        self.next.write(data)
        if receiving is None:
            return
        phase = receiving.phase
        # How much of the device's own state the profile has no room for is known at the source alone.
        seconds = self._call_seconds("write", phase, len(data) - (receiving.own_bytes - own))
        # What did not arrive in PRE_COPY is loaded from what STOP_COPY has.
        if receiving.initial_ends > ends or (phase == "stop_copy" and not receiving.loaded):
            seconds += known(self._profile.loading.initial_seconds)
            receiving.loaded = True
        self._paced("write", began, seconds)

    def stop_copy_length(self) -> int:
        """Serve MIG_DATA_SIZE, if the profile's device has it."""
        has = self._profile.features.data_size
        if has is not None and not has.value:
            raise UnavailableError("has no MIG_DATA_SIZE", errno.ENOTTY)
        return self.next.stop_copy_length()

    def opt_in(self, enabled: bool) -> None:
        """Serve MIG_PRECOPY_INFOv2, if the profile's device has it."""
        has = self._profile.features.precopy_info_v2
        if has is not None and not has.value:
            raise UnavailableError("has no MIG_PRECOPY_INFOv2", errno.ENOTTY)
        self.next.opt_in(enabled)
