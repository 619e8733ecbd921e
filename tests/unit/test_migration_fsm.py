"""The state machine against an oracle written from <linux/vfio.h>'s text alone."""

from __future__ import annotations

import pytest

from vfu_dev.migration import StateMachine, TransitionError
from vfu_dev.uapi import DeviceState as S
from vfu_dev.uapi import MigrationFlags as F

STOP_COPY, P2P, PRE_COPY = F.VFIO_MIGRATION_STOP_COPY, F.VFIO_MIGRATION_P2P, F.VFIO_MIGRATION_PRE_COPY

# The next step of vfio_mig_get_next_state() with all optional features, transcribed row by row: the columns
# are the states asked for, in the order of COLUMNS.
KERNEL_TABLE = {
    S.STOP: "STOP RUNNING_P2P RUNNING_P2P RUNNING_P2P STOP_COPY RESUMING RUNNING_P2P",
    S.RUNNING: "RUNNING_P2P RUNNING PRE_COPY RUNNING_P2P RUNNING_P2P RUNNING_P2P RUNNING_P2P",
    S.PRE_COPY: "RUNNING RUNNING PRE_COPY PRE_COPY_P2P PRE_COPY_P2P RUNNING RUNNING",
    S.PRE_COPY_P2P: "RUNNING_P2P RUNNING_P2P PRE_COPY PRE_COPY_P2P STOP_COPY RUNNING_P2P RUNNING_P2P",
    S.STOP_COPY: "STOP STOP ERROR ERROR STOP_COPY STOP STOP",
    S.RESUMING: "STOP STOP STOP STOP STOP RESUMING STOP",
    S.RUNNING_P2P: "STOP RUNNING RUNNING PRE_COPY_P2P STOP STOP RUNNING_P2P",
    S.ERROR: "ERROR ERROR ERROR ERROR ERROR ERROR ERROR",
}
COLUMNS = (S.STOP, S.RUNNING, S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY, S.RESUMING, S.RUNNING_P2P)


def oracle(origin: S, target: S, flags: F) -> list[S] | None:
    """Return the states passed, or None when refused; states that are not announced are passed silently."""
    p2p, pre_copy = bool(flags & P2P), bool(flags & PRE_COPY)
    missing = set()
    if not p2p:
        missing |= {S.RUNNING_P2P, S.PRE_COPY_P2P}
    if not pre_copy:
        missing |= {S.PRE_COPY, S.PRE_COPY_P2P}
    if target in missing or origin in missing or target is S.ERROR:
        return None
    path: list[S] = []
    at = origin
    while at is not target:
        at = S[KERNEL_TABLE[at].split()[COLUMNS.index(target)]]
        if at is S.ERROR:
            return None
        if at not in missing:
            path.append(at)
    return path


@pytest.mark.parametrize(
    "flags", [STOP_COPY, STOP_COPY | P2P, STOP_COPY | PRE_COPY, STOP_COPY | P2P | PRE_COPY]
)
@pytest.mark.parametrize("origin", list(S))
@pytest.mark.parametrize("target", list(S))
def test_every_pair_goes_where_the_kernel_goes(origin: S, target: S, flags: F) -> None:
    machine = StateMachine(flags)
    if origin not in machine.states:
        return
    expected = oracle(origin, target, flags)
    if expected is None:
        with pytest.raises(TransitionError) as caught:
            machine.path(origin, target)
        assert (caught.value.state, caught.value.wanted) == (origin, target)
    else:
        assert machine.path(origin, target) == expected


@pytest.mark.parametrize(
    "flags", [STOP_COPY, STOP_COPY | P2P, STOP_COPY | PRE_COPY, STOP_COPY | P2P | PRE_COPY]
)
def test_every_step_of_a_path_is_an_arc(flags: F) -> None:
    machine = StateMachine(flags)
    for origin in machine.states:
        for target in machine.states:
            at = origin
            for step in oracle(origin, target, flags) or ():
                machine.action(at, step)
                at = step


def test_stop_copy_is_obligatory() -> None:
    with pytest.raises(ValueError, match="obligatory"):
        StateMachine(P2P)


def test_an_arc_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TransitionError):
        StateMachine(STOP_COPY | P2P).action(S.RUNNING, S.STOP)
