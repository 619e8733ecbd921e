"""The migration state machine as data: every arc of enum vfio_device_mig_state and what happens on it.

Source: the comment above `enum vfio_device_mig_state` in <linux/vfio.h>. A request that is not an arc takes
the shortest path of arcs. Its interior has no state of the saving group, unless both ends are in that group.
The states of that group share one session. The kernel's own table (vfio_mig_get_next_state) reads the rule
like that, as PRE_COPY -> PRE_COPY_P2P -> STOP_COPY shows.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import NamedTuple

from vfu_dev.errors import StateError
from vfu_dev.uapi import DeviceState, MigrationFlags

S = DeviceState

SAVING_GROUP = frozenset({S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY})
PRE_COPY_GROUP = frozenset({S.PRE_COPY, S.PRE_COPY_P2P})
P2P_STATES = frozenset({S.RUNNING_P2P, S.PRE_COPY_P2P})
# The states in which guest writes are served; the device does not change in any other.
RUNNING_GROUP = frozenset({S.RUNNING, S.RUNNING_P2P, S.PRE_COPY, S.PRE_COPY_P2P})


ALL_FLAGS = (
    MigrationFlags.VFIO_MIGRATION_STOP_COPY
    | MigrationFlags.VFIO_MIGRATION_P2P
    | MigrationFlags.VFIO_MIGRATION_PRE_COPY
)


class Action(Enum):
    """What an arc does to the data transfer session."""

    NONE = "none"
    BEGIN_SAVE = "begin save"
    STOP_SAVE = "only the rest is left to save"
    END_SAVE = "end save"
    BEGIN_RESUME = "begin resume"
    END_RESUME = "end resume"


class Arc(NamedTuple):
    """One arc: from, to, what it does, whether it exists with P2P, without it, or both."""

    origin: DeviceState
    target: DeviceState
    action: Action
    with_p2p: bool = True
    without_p2p: bool = True


_NO_P2P = {"with_p2p": False}
_P2P = {"without_p2p": False}

ARCS: tuple[Arc, ...] = (
    Arc(S.RUNNING, S.RUNNING_P2P, Action.NONE, **_P2P),
    Arc(S.RUNNING_P2P, S.RUNNING, Action.NONE, **_P2P),
    Arc(S.RUNNING_P2P, S.STOP, Action.NONE, **_P2P),
    Arc(S.STOP, S.RUNNING_P2P, Action.NONE, **_P2P),
    Arc(S.RUNNING, S.STOP, Action.NONE, **_NO_P2P),
    Arc(S.STOP, S.RUNNING, Action.NONE, **_NO_P2P),
    Arc(S.RUNNING, S.PRE_COPY, Action.BEGIN_SAVE),
    Arc(S.RUNNING_P2P, S.PRE_COPY_P2P, Action.BEGIN_SAVE, **_P2P),
    Arc(S.STOP, S.STOP_COPY, Action.BEGIN_SAVE),
    Arc(S.PRE_COPY, S.PRE_COPY_P2P, Action.NONE, **_P2P),
    Arc(S.PRE_COPY_P2P, S.PRE_COPY, Action.NONE, **_P2P),
    Arc(S.PRE_COPY_P2P, S.STOP_COPY, Action.STOP_SAVE, **_P2P),
    Arc(S.PRE_COPY, S.STOP_COPY, Action.STOP_SAVE, **_NO_P2P),
    Arc(S.PRE_COPY, S.RUNNING, Action.END_SAVE),
    Arc(S.PRE_COPY_P2P, S.RUNNING_P2P, Action.END_SAVE, **_P2P),
    Arc(S.STOP_COPY, S.STOP, Action.END_SAVE),
    Arc(S.STOP, S.RESUMING, Action.BEGIN_RESUME),
    Arc(S.RESUMING, S.STOP, Action.END_RESUME),
)


class TransitionError(StateError):
    """An arc or path that does not exist; nothing has changed.

    Attributes:
        state: the present state.
        wanted: the state that was asked for.
    """

    def __init__(self, state: DeviceState, wanted: DeviceState, reason: str) -> None:
        super().__init__(f"no way from {state.name} to {wanted.name}: {reason}")
        self.state = state
        self.wanted = wanted


class StateMachine:
    """The arcs that a device with `flags` has.

    Args: flags: what the device announces; STOP_COPY is obligatory.
    """

    def __init__(self, flags: MigrationFlags) -> None:
        if not flags & MigrationFlags.VFIO_MIGRATION_STOP_COPY:
            raise ValueError("VFIO_MIGRATION_STOP_COPY is obligatory (struct vfio_device_feature_migration)")
        self.flags = flags
        p2p = bool(flags & MigrationFlags.VFIO_MIGRATION_P2P)
        pre_copy = bool(flags & MigrationFlags.VFIO_MIGRATION_PRE_COPY)
        self._arcs: dict[DeviceState, dict[DeviceState, Action]] = {state: {} for state in DeviceState}
        for arc in ARCS:
            if not (arc.with_p2p if p2p else arc.without_p2p):
                continue
            # "Arcs touching PRE_COPY and PRE_COPY_P2P are removed if support for PRE_COPY is not present."
            if not pre_copy and PRE_COPY_GROUP & {arc.origin, arc.target}:
                continue
            self._arcs[arc.origin][arc.target] = arc.action
        self.states = frozenset(s for s, targets in self._arcs.items() if targets) | {DeviceState.ERROR}

    def action(self, origin: DeviceState, target: DeviceState) -> Action:
        """Return what the single arc does.

        Raises: TransitionError: there is no such arc.
        """
        try:
            return self._arcs[origin][target]
        except KeyError:
            raise TransitionError(origin, target, "not a single arc of this device") from None

    def path(self, origin: DeviceState, target: DeviceState) -> list[DeviceState]:
        """Return the states to pass, the last one `target`; empty when already there.

        Raises: TransitionError: no path, a state this device does not have, or one that cannot be asked for.
        """
        if target is DeviceState.ERROR:
            raise TransitionError(origin, target, "ERROR cannot be asked for")
        if target not in self.states:
            raise TransitionError(origin, target, "the device does not announce that state")
        if origin is DeviceState.ERROR:
            raise TransitionError(origin, target, "only a reset leads out of ERROR")
        if origin is DeviceState.STOP_COPY and target in PRE_COPY_GROUP:
            raise TransitionError(origin, target, "not permitted by <linux/vfio.h>")
        within_session = origin in SAVING_GROUP and target in SAVING_GROUP
        seen: set[DeviceState] = {origin}
        waiting: deque[tuple[DeviceState, list[DeviceState]]] = deque([(origin, [])])
        while waiting and origin is not target:
            state, path = waiting.popleft()
            for step in self._arcs[state]:
                if step is target:
                    return [*path, step]
                if step not in seen and (within_session or step not in SAVING_GROUP):
                    seen.add(step)
                    waiting.append((step, [*path, step]))
        if origin is target:
            return []
        raise TransitionError(origin, target, "no path")  # pragma: no cover - the graph is connected
