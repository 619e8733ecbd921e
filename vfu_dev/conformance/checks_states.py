"""The migration state machine: every pair of states, and the states that cannot be asked for."""

from __future__ import annotations

from vfu_dev.conformance import arcs
from vfu_dev.conformance.checks_stream import resume
from vfu_dev.conformance.model import Check, Level, Source, add, check, kernel, require, spec
from vfu_dev.conformance.session import Session
from vfu_dev.uapi import DeviceState, MigrationFlags

S = DeviceState
_MIGRATION = "VFIO_DEVICE_FEATURE_MIGRATION"
_ALL = MigrationFlags(0x7)
_NAMES = {state.name: state for state in S if state is not S.ERROR}

# Direct arcs and the sentence that has them; `<linux/vfio.h>` where P2P is part of it.
_RUN_STOP = spec(
    "Direct State Transitions",
    "``RUNNING -> STOP``, ``STOP_COPY -> STOP``: Stop the operation of the device.",
)
_SAVE = spec(
    "Direct State Transitions",
    "``RUNNING -> PRE_COPY``, ``STOP -> STOP_COPY``: Begin the process of saving the device state.",
)
_DIRECT: dict[tuple[DeviceState, DeviceState], Source] = {
    (S.RUNNING, S.STOP): _RUN_STOP,
    (S.STOP_COPY, S.STOP): _RUN_STOP,
    (S.RESUMING, S.STOP): spec(
        "Direct State Transitions", "``RESUMING -> STOP``: Terminate the data transfer session."
    ),
    (S.PRE_COPY, S.RUNNING): spec(
        "Direct State Transitions", "``PRE_COPY -> RUNNING``: Terminate the data transfer session."
    ),
    (S.STOP, S.RUNNING): spec(
        "Direct State Transitions", "``STOP -> RUNNING``: Start the operation of the device."
    ),
    (S.RUNNING, S.PRE_COPY): _SAVE,
    (S.STOP, S.STOP_COPY): _SAVE,
    (S.PRE_COPY, S.STOP_COPY): spec(
        "Direct State Transitions",
        "``PRE_COPY -> STOP_COPY``: Continue to transfer migration data, but stop device operation.",
    ),
    (S.STOP, S.RESUMING): spec(
        "Direct State Transitions", "``STOP -> RESUMING``: Start the process of restoring the device state."
    ),
}
_BLOCKED: dict[tuple[DeviceState, DeviceState], Source] = {
    (S.STOP_COPY, S.PRE_COPY): spec(
        "Direct State Transitions",
        "The ``STOP_COPY -> PRE_COPY`` transition is explicitly not allowed and should return an error if "
        "requested.",
    ),
    (S.STOP_COPY, S.PRE_COPY_P2P): kernel(
        "enum vfio_device_mig_state", "These arcs are not permitted and return error if requested."
    ),
}
_COMBINED = spec(
    "Complex State Transitions",
    "The remaining possible transitions are to be implemented as combinations of the above FSM arcs.",
)
_P2P = kernel(
    "enum vfio_device_mig_state",
    "The remaining possible transitions are interpreted as combinations of the above FSM arcs.",
)
_P2P_DIRECT = kernel(
    "enum vfio_device_mig_state",
    "The optional peer to peer (P2P) quiescent state is intended to be a quiescent state for the device "
    "for the "
    "purposes of managing multiple devices within a user context where peer-to-peer DMA between devices "
    "may be "
    "active.",
)
_SAME_STATE = Source(
    "vfio-user-migration.rst (vfu-dev)",
    "State changes",
    "A request for the state that the device is in succeeds, and does nothing.",
)


def _source(start: DeviceState, end: DeviceState) -> Source:
    if start is end:
        return _SAME_STATE
    p2p = {start, end} & {S.RUNNING_P2P, S.PRE_COPY_P2P}
    direct = (start, end) in arcs.arcs(_ALL)
    other = (_P2P_DIRECT if direct else _P2P) if p2p else _COMBINED
    return _DIRECT.get((start, end)) or _BLOCKED.get((start, end)) or other


def enter(session: Session, state: DeviceState) -> None:
    """Take the device from RUNNING to `state`; RESUMING is entered with a whole state written."""
    if state is S.RESUMING:
        resume(session, finish=False)
    elif state is not S.RUNNING:
        session.set_state(state)


def _judge_arc(session: Session, start: DeviceState, end: DeviceState) -> None:
    session.need_states(start, end)
    enter(session, start)
    found = session.state()
    require(found == start, f"after the way to {start.name} the state is {_name(found)}")
    reply = session.ask_state(end)
    found = session.state()
    if arcs.paths(session.flags, start, end):
        require(not reply.refused, f"{start.name} to {end.name} is refused: {reply.reason}")
        require(found == end, f"after {start.name} to {end.name} the state is {_name(found)}")
        return
    require(reply.refused, f"{start.name} to {end.name} succeeds")
    allowed = (start, S.ERROR)
    require(found in allowed, f"after {start.name} to {end.name} was refused the state is {_name(found)}")


def _name(number: int) -> str:
    try:
        return S(number).name
    except ValueError:
        return str(number)


def _add_arcs() -> None:
    for first, start in _NAMES.items():
        for second, end in _NAMES.items():
            allowed = bool(arcs.paths(_ALL, start, end))
            if start is end:
                about = f"A request for {first} in {first} succeeds, and does nothing."
            else:
                about = f"From {first} the device {'gets to' if allowed else 'is not let to'} {second}."

            def run(session: Session, start: DeviceState = start, end: DeviceState = end) -> None:
                _judge_arc(session, start, end)

            name = f"arc-{first}-to-{second}".lower().replace("_", "-")
            level = Level.SHOULD if start is end else Level.MUST
            add(Check(name, "states", level, _source(start, end), about, run))


def _require_flag(session: Session, flag: MigrationFlags, name: str) -> None:
    session.need_migration()
    require(flag in session.flags, f"migration flags {int(session.flags):#x} without {name}")


@check(Level.MUST, spec(_MIGRATION, "at least ``VFIO_MIGRATION_STOP_COPY`` must be set."))
def migration_has_stop_copy(session: Session) -> None:
    """A device that migrates has STOP_COPY."""
    _require_flag(session, MigrationFlags.VFIO_MIGRATION_STOP_COPY, "STOP_COPY")


@check(
    Level.OPTIONAL,
    kernel("VFIO_DEVICE_FEATURE_MIGRATION", "VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY means that"),
)
def migration_has_precopy(session: Session) -> None:
    """The device has PRE_COPY: its state moves while it runs."""
    _require_flag(session, MigrationFlags.VFIO_MIGRATION_PRE_COPY, "PRE_COPY")


@check(
    Level.OPTIONAL,
    kernel("VFIO_DEVICE_FEATURE_MIGRATION", "VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P means that"),
)
def migration_has_p2p(session: Session) -> None:
    """The device has the P2P states: QEMU migrates a VM with more than one device only if all have them."""
    _require_flag(session, MigrationFlags.VFIO_MIGRATION_P2P, "P2P")


@check(
    Level.MUST,
    spec(_MIGRATION, "If ``GET`` succeeds, the ``RUNNING`` and ``ERROR`` states are always supported."),
)
def migration_begins_in_running(session: Session) -> None:
    """A device that nobody has asked anything is in RUNNING."""
    session.need_migration()
    session.drop()
    found = session.state()
    require(found == S.RUNNING, f"the state of a new client's device is {_name(found)}")


@check(Level.MUST, spec("Direct State Transitions", "``ERROR`` cannot be specified as a device state"))
def state_error_cannot_be_asked_for(session: Session) -> None:
    """A request for ERROR is refused."""
    session.need_migration()
    require(session.ask_state(S.ERROR).refused, "a request for ERROR succeeds")
    found = session.state()
    require(found == S.RUNNING, f"after a request for ERROR the state is {_name(found)}")


@check(
    Level.MUST,
    kernel(
        "enum vfio_device_mig_state",
        "The optional states cannot be used with SET_STATE if the device does not support them.",
    ),
)
def state_that_is_not_there_is_refused(session: Session) -> None:
    """States that the device does not have are refused, and so are numbers that are no state."""
    session.need_migration()
    missing = [state for state in _NAMES.values() if state not in arcs.states(session.flags)]
    for number in (*missing, 8, 0xFFFFFFFF):
        require(
            session.ask_state(number).refused, f"a request for {_name(number)}, which is not there, succeeds"
        )


@check(
    Level.MUST,
    spec(
        "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE",
        "The state transition must fully complete before the reply is sent.",
    ),
)
def state_is_reached_before_the_reply(session: Session) -> None:
    """The state is the one asked for as soon as the reply is there."""
    session.need_migration()
    for state in (S.STOP, S.RUNNING, S.STOP, S.STOP_COPY, S.STOP, S.RUNNING):
        session.set_state(state)
        found = session.state()
        require(found == state, f"after the reply to {state.name} the state is {_name(found)}")


_add_arcs()
