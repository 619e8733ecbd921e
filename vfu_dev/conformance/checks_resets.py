"""DEVICE_RESET in every migration state, and the way out of ERROR."""

from __future__ import annotations

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.checks_states import enter
from vfu_dev.conformance.checks_stream import ask_write, save
from vfu_dev.conformance.model import Check, Level, NotApplicableError, add, check, require, spec
from vfu_dev.conformance.session import Session
from vfu_dev.uapi import DeviceState

S = DeviceState
_RESET = spec("VFIO_USER_DEVICE_RESET", "Neither the request or reply have a payload.")


def _need_reset(session: Session) -> None:
    if not session.info[0] & messages.DEVICE_FLAG_RESET:
        raise NotApplicableError("the device cannot be reset")


def _reset(session: Session) -> None:
    reply = session.accepted(uapi.VFIO_USER_DEVICE_RESET)
    require(not reply.payload, f"{len(reply.payload)} bytes in reply to DEVICE_RESET")


@check(Level.MUST, _RESET)
def reset_is_answered(session: Session) -> None:
    """DEVICE_RESET succeeds, without a payload, and the device can be used afterwards."""
    _need_reset(session)
    _reset(session)
    require(
        session.region(uapi.VFIO_PCI_CONFIG_REGION_INDEX).size_bytes, "no configuration space after a reset"
    )


def _reset_in(session: Session, state: DeviceState) -> None:
    """Wherever a migration is, the guest may reset the device; the client has to find a way on."""
    _need_reset(session)
    session.need_states(state)
    enter(session, state)
    _reset(session)
    if session.state() == S.RESUMING:  # kept by servers that leave the migration state alone
        session.set_state(S.STOP)
    if session.state() != S.RUNNING:
        session.set_state(S.RUNNING)
    found = session.state()
    require(
        found == S.RUNNING, f"after a reset in {state.name} and a request for RUNNING the state is {found}"
    )


def _add_resets() -> None:
    for state in S:
        if state in (S.ERROR, S.RUNNING):
            continue

        def run(session: Session, state: DeviceState = state) -> None:
            _reset_in(session, state)

        about = f"A reset in {state.name} succeeds, and RUNNING can be reached from there."
        add(
            Check(
                f"reset-in-{state.name.lower().replace('_', '-')}", "resets", Level.MUST, _RESET, about, run
            )
        )


@check(
    Level.MUST,
    spec(
        "Direct State Transitions",
        "To recover from ``ERROR``, ``VFIO_USER_DEVICE_RESET`` must be used to return back to ``RUNNING``.",
    ),
)
def reset_recovers_from_error(session: Session) -> None:
    """A reset takes a device that refused a damaged state, and is in ERROR, to RUNNING."""
    _need_reset(session)
    session.need_migration()
    data = save(session)
    session.set_state(S.RESUMING)
    ask_write(session, data[: len(data) // 2][: session.transfer_bytes])
    refused = session.ask_state(S.STOP).refused
    if not refused or session.state() != S.ERROR:
        raise NotApplicableError("half of a state does not take the device to ERROR")
    _reset(session)
    found = session.state()
    require(found == S.RUNNING, f"after a reset in ERROR the state is {found}")


_add_resets()
