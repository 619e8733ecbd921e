"""The migration state machine of `<linux/vfio.h>`, written independently of `vfu_dev.migration.fsm`.

From the comment above enum vfio_device_mig_state: the arcs a driver must do, arcs that P2P replaces, those
that go without PRE_COPY, the one combination that is blocked, and "the shortest path, saving group states not
as interior arcs, only as start or end". It judges the server's transitions, so it is plain rather than fast.
"""

from __future__ import annotations

from vfu_dev.uapi import DeviceState, MigrationFlags

S = DeviceState
SAVING = {S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY}


def arcs(flags: MigrationFlags) -> set[tuple[DeviceState, DeviceState]]:
    """Return the arcs that exist for a device with `flags`."""
    found = {
        (S.RESUMING, S.STOP),
        (S.STOP, S.RESUMING),
        (S.STOP, S.STOP_COPY),
        (S.STOP_COPY, S.STOP),
        (S.RUNNING, S.PRE_COPY),
        (S.PRE_COPY, S.RUNNING),
    }
    if MigrationFlags.VFIO_MIGRATION_P2P in flags:
        found |= {
            (S.RUNNING, S.RUNNING_P2P),
            (S.RUNNING_P2P, S.RUNNING),
            (S.RUNNING_P2P, S.STOP),
            (S.STOP, S.RUNNING_P2P),
            (S.RUNNING_P2P, S.PRE_COPY_P2P),
            (S.PRE_COPY_P2P, S.RUNNING_P2P),
            (S.PRE_COPY, S.PRE_COPY_P2P),
            (S.PRE_COPY_P2P, S.PRE_COPY),
            (S.PRE_COPY_P2P, S.STOP_COPY),
        }
    else:
        found |= {(S.RUNNING, S.STOP), (S.STOP, S.RUNNING), (S.PRE_COPY, S.STOP_COPY)}
    if MigrationFlags.VFIO_MIGRATION_PRE_COPY not in flags:
        found = {arc for arc in found if not {S.PRE_COPY, S.PRE_COPY_P2P} & set(arc)}
    return found


def states(flags: MigrationFlags) -> set[DeviceState]:
    """Return the states a device with `flags` can be asked into."""
    return {state for arc in arcs(flags) for state in arc}


def paths(flags: MigrationFlags, start: DeviceState, end: DeviceState) -> list[list[DeviceState]]:
    """Return every shortest allowed path from `start` to `end`, `start` left out; empty: not allowed.

    States of the saving group are interior only if both ends are in the group: as in the kernel's table,
    PRE_COPY to STOP_COPY goes by PRE_COPY_P2P.
    """
    if start is S.STOP_COPY and end in {S.PRE_COPY, S.PRE_COPY_P2P}:
        return []
    if end not in states(flags) or start not in states(flags):
        return []
    if start is end:
        return [[]]
    both_saving = start in SAVING and end in SAVING
    longer: list[list[DeviceState]] = [[]]
    for _ in range(len(S)):
        found = []
        following = []
        for path in longer:
            last = path[-1] if path else start
            for origin, target in arcs(flags):
                if origin is not last or target in path or target is start:
                    continue
                if target is end:
                    found.append([*path, target])
                elif target not in SAVING or both_saving:
                    following.append([*path, target])
        if found:
            return found
        longer = following
    return []
