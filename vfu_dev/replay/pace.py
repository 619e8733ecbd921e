"""The times of a replay: a layer around a device's callbacks, in which each call takes what the profile says.

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
        self._reads = {phase: draw_of(getattr(profile.reads, phase).seconds) for phase in PHASES}
        self._writes = {phase: draw_of(getattr(profile.writes, phase).seconds) for phase in PHASES}
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
            asked = time.monotonic()
            self._await(self._resource)
            waited = time.monotonic() - asked
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

    def _await(self, resource: SharedResource) -> None:
        """Take the resource, or return without it where nobody waits for this call any more."""
        taken = False

        def over() -> bool:
            nonlocal taken
            taken = taken or resource.take()
            return taken

        until = 0.0
        while not over() and time.monotonic() >= until:
            until = time.monotonic() + _TRY_SECONDS  # `hold` returns before it if nobody waits
            self._hold(_TRY_SECONDS, over)

    def _call_seconds(self, operation: str, phase: Phase, calls: Any, draw: Draw | None) -> float:
        """Return how long this call takes; the first one of a phase may have a time of its own."""
        first = (operation, phase) not in self._first
        self._first.add((operation, phase))
        if first and calls.first_seconds is not None:
            return known(calls.first_seconds)
        return 0.0 if draw is None else draw()

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

    def _before_read(self) -> tuple[float, Phase]:
        saving = self._sessions.saving
        if saving is None:
            return time.monotonic(), "dirty"
        if not saving.ready:
            raise UnavailableError("has no initial data yet", errno.ENOMSG)
        return time.monotonic(), saving.phase

    def _after_read(self, began: float, phase: Phase, stored: int) -> None:
        if stored:
            calls = getattr(self._profile.reads, phase)
            self._paced("read", began, self._call_seconds("read", phase, calls, self._reads[phase]))

    def read_into(self, buffer: memoryview) -> int:
        """Serve MIG_DATA_READ in its time."""
        began, phase = self._before_read()
        stored = self.next.read_into(buffer)
        self._after_read(began, phase, stored)
        return stored

    def gather(self, count: int) -> Vectors | None:
        """Serve MIG_DATA_READ in its time, without a copy."""
        began, phase = self._before_read()
        vectors = self.next.gather(count)
        if vectors is not None:
            self._after_read(began, phase, int(vectors[:, 1].sum()))
        return vectors

    def write(self, data: memoryview) -> None:
        """Serve MIG_DATA_WRITE in its time."""
        began, receiving = time.monotonic(), self._sessions.receiving
        ends = 0 if receiving is None else receiving.initial_ends
        self.next.write(data)
        if receiving is None:
            return
        phase = receiving.phase
        calls = getattr(self._profile.writes, phase)
        seconds = self._call_seconds("write", phase, calls, self._writes[phase])
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
