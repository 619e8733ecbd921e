"""VERSION, and how connections begin and end. These come last: a server may end with its client."""

from __future__ import annotations

import os
import select
import struct
import time

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.checks_irqs import EVENTFD, first_irq, set_irqs
from vfu_dev.conformance.model import (
    CheckFailedError,
    ClosedError,
    Level,
    NoAnswerError,
    NotApplicableError,
    check,
    require,
    spec,
)
from vfu_dev.conformance.peer import Reply
from vfu_dev.conformance.session import IOVA, PROPOSED, Session
from vfu_dev.conformance.version import version_capabilities, version_request

_SECTION = "VFIO_USER_VERSION"
_LEAVING = "Client Disconnection"
_SECOND_CLIENT_SECONDS = 1.0


def _version_of(session: Session, payload: bytes) -> Reply:
    peer, reply = session.hello(payload)
    peer.close()
    return reply


def _accepted(session: Session, payload: bytes) -> Reply:
    reply = _version_of(session, payload)
    require(not reply.refused, f"VERSION is refused: {reply.reason}")
    require(len(reply.payload) >= messages.VERSION.size, f"a VERSION reply of {len(reply.payload)} bytes")
    return reply


def _refused_or_closed(session: Session, payload: bytes, what: str) -> None:
    try:
        reply = _version_of(session, payload)
    except ClosedError:
        return
    require(reply.refused, f"{what} is accepted")


@check(
    Level.SHOULD,
    spec(
        _LEAVING,
        "Therefore in order for the protocol to be forward compatible, the server should respond to a client "
        "disconnection as follows:",
    ),
    fresh=True,
)
def next_client_is_served(session: Session) -> None:
    """A client that follows another one finds the device."""
    for _ in range(2):
        _accepted(session, version_request(PROPOSED))


@check(Level.MUST, spec(_SECTION, "The major version in the reply must be the same as proposed."), fresh=True)
def version_keeps_the_major(session: Session) -> None:
    """The reply has the major version that was proposed."""
    (major,) = struct.unpack_from("<H", _accepted(session, version_request(PROPOSED)).payload)
    require(major == 0, f"the reply has major version {major}, 0 was proposed")


@check(
    Level.MUST,
    spec(
        _SECTION, "The minor version in the reply must be equal to or less than the minor version proposed."
    ),
    fresh=True,
)
def version_does_not_raise_the_minor(session: Session) -> None:
    """The reply has no higher minor version than was proposed."""
    _, minor = struct.unpack_from("<HH", _accepted(session, version_request(PROPOSED)).payload)
    require(minor == 0, f"the reply has minor version {minor}, 0 was proposed")


@check(
    Level.SHOULD,
    spec(
        _SECTION,
        "Both the client and server must support all minor versions less than the maximum minor version it "
        "supports.",
    ),
    fresh=True,
)
def version_takes_a_newer_minor(session: Session) -> None:
    """A client that proposes minor version 9 gets an answer with one that the server has."""
    _, minor = struct.unpack_from("<HH", _accepted(session, version_request(PROPOSED, 0, 9)).payload)
    require(minor <= 9, f"the reply has minor version {minor}, 9 was proposed")


@check(
    Level.MUST,
    spec(
        "Connection Initiation",
        "The server replies with a compatible version and set of capabilities it supports, or closes the "
        "connection if it cannot support the advertised version.",
    ),
    fresh=True,
)
def version_refuses_another_major(session: Session) -> None:
    """A client of major version 77 is refused, or the connection is closed."""
    _refused_or_closed(session, version_request(PROPOSED, 77), "major version 77")


@check(
    Level.MUST,
    spec(
        _SECTION, "The version data is an optional UTF-8 encoded JSON byte array with the following format:"
    ),
    fresh=True,
)
def version_data_is_optional(session: Session) -> None:
    """A client that sends no version data is accepted."""
    _accepted(session, version_request(None))


@check(Level.MUST, spec(_SECTION, "variable (including terminating NUL). Optional."), fresh=True)
def version_data_is_json(session: Session) -> None:
    """The reply's version data is a JSON object that ends with a NUL."""
    version_capabilities(_accepted(session, version_request(PROPOSED)).payload)


@check(
    Level.MUST,
    spec(
        _SECTION,
        "Maximum ``count`` for data transfer messages; see `Read and Write Operations`_. Optional, with a "
        "default value of 1048576 bytes.",
    ),
    fresh=True,
)
def version_limits_are_numbers(session: Session) -> None:
    """The limits in the reply are whole numbers above zero."""
    found = version_capabilities(_accepted(session, version_request(PROPOSED)).payload)
    for name in ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes"):
        value = found.get(name, 1)
        require(type(value) is int and 0 < value < 1 << 64, f"{name} is {value!r}")


@check(Level.MUST, spec(_SECTION, "The capability list must be a subset of those proposed."), fresh=True)
def version_offers_what_was_proposed(session: Session) -> None:
    """The reply names no capability that the client did not propose."""
    proposed = {"max_data_xfer_size": PROPOSED["max_data_xfer_size"]}
    found = version_capabilities(_accepted(session, version_request(proposed)).payload)
    more = sorted(found.keys() - proposed.keys())
    require(not more, f"the reply names {', '.join(more)}, which was not proposed")


@check(
    Level.MUST,
    spec(
        _SECTION,
        "If and only if the client has indicated support for twin-socket mode by setting "
        "``twin_socket.supported`` to true in its capabilities, the server may optionally set up a separate "
        "command channel for server-to-client commands and their replies.",
    ),
    fresh=True,
)
def version_keeps_to_one_socket(session: Session) -> None:
    """No second socket is set up for a client that did not propose one."""
    peer, reply = session.hello(version_request(PROPOSED))
    with_fds = len(reply.fds)
    peer.close()
    require(not with_fds, f"{with_fds} file descriptors come with the reply")
    twin = version_capabilities(reply.payload).get("twin_socket", {})
    on = isinstance(twin, dict) and twin.get("supported")
    require(not on, "the reply turns the twin socket on")


@check(
    Level.SHOULD,
    spec(
        _SECTION, "The version data is an optional UTF-8 encoded JSON byte array with the following format:"
    ),
    fresh=True,
)
def version_refuses_what_is_no_json(session: Session) -> None:
    """Version data that is no JSON is refused, or the connection is closed."""
    payload = messages.VERSION.pack(0, 0) + b"{{{ no JSON\0"
    _refused_or_closed(session, payload, "version data that is no JSON")


@check(
    Level.SHOULD,
    spec(
        _SECTION,
        "Upon establishing a connection, the client must send a ``VFIO_USER_VERSION`` message proposing a "
        "protocol version and a set of capabilities.",
    ),
    fresh=True,
)
def version_comes_first(session: Session) -> None:
    """A request before VERSION is not carried out."""
    with session.fresh() as peer:
        try:
            reply = peer.ask(
                uapi.VFIO_USER_DEVICE_GET_INFO, messages.DEVICE_INFO.pack(messages.DEVICE_INFO.size, 0, 0, 0)
            )
        except ClosedError:
            return
        require(reply.refused, "DEVICE_GET_INFO succeeds before VERSION")


@check(Level.OPTIONAL, spec("Socket", "one or more clients, and/or"), fresh=True)
def second_client_is_told(session: Session) -> None:
    """A second client gets an answer, a refusal or a closed connection within a second."""
    first, reply = session.hello(version_request(PROPOSED))
    try:
        require(not reply.refused, f"VERSION is refused: {reply.reason}")
        second = session.open()
        try:
            second.deadline = min(second.deadline, time.monotonic() + _SECOND_CLIENT_SECONDS)
            second.ask(uapi.VFIO_USER_VERSION, version_request(PROPOSED))
        except ClosedError:
            return
        except NoAnswerError:
            raise CheckFailedError("a second client is left waiting") from None
        finally:
            second.close()
    finally:
        first.close()


@check(
    Level.SHOULD,
    spec(
        _LEAVING,
        "all client memory regions are unmapped and cleaned up (including closing any passed file "
        "descriptors)",
    ),
    fresh=True,
)
def next_client_finds_no_mappings(session: Session) -> None:
    """What the last client mapped is gone: the same range can be mapped again."""
    session.map(IOVA, 1 << 20)
    session.drop()
    session.map(IOVA, 1 << 20)


@check(
    Level.SHOULD,
    spec(_LEAVING, "all IRQ file descriptors passed from the old client are closed"),
    fresh=True,
)
def next_client_finds_no_eventfds(session: Session) -> None:
    """The file descriptors of interrupts are closed when their client has gone."""
    index, _ = first_irq(session)
    # The end of a pipe tells when its last other end is closed; an eventfd does not.
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            reply = set_irqs(session, index, EVENTFD, 0, 1, fds=[writing])
        finally:
            os.close(writing)
        if reply.refused:
            raise NotApplicableError("the server takes eventfds alone")
        session.drop()
        poll = select.poll()
        poll.register(reading, 0)
        left = max(0.0, session.deadline - time.monotonic())
        require(bool(poll.poll(left * 1000)), "the server keeps the eventfds of a client that has gone")
    finally:
        os.close(reading)


def _after_garbage(session: Session, data: bytes, what: str) -> None:
    """Send `data` after VERSION: it is refused or ends the connection, and the next client is served."""
    peer, reply = session.hello(version_request(PROPOSED))
    try:
        require(not reply.refused, f"VERSION is refused: {reply.reason}")
        peer.send_bytes(data, what=what)
        try:
            answer = peer.receive(what)
        except ClosedError:
            pass
        else:
            require(answer.refused, f"{what} is answered as if it was fine")
    finally:
        peer.close()
    _accepted(session, version_request(PROPOSED))


_VALIDATE = spec(
    "Security Considerations",
    "Standard tools and mechanisms should be used on both sides to validate input and prevent against denial "
    "of service scenarios, buffer overflow, etc.",
)


@check(Level.SHOULD, _VALIDATE, fresh=True)
def message_shorter_than_its_header(session: Session) -> None:
    """A message that says it has 8 bytes is refused or ends the connection; the next client is served."""
    header = uapi.VFIO_USER_HEADER.pack(1, uapi.VFIO_USER_DEVICE_GET_INFO, 8, 0, 0)
    _after_garbage(session, header, "a message of 8 bytes")


@check(Level.SHOULD, _VALIDATE, fresh=True)
def message_of_four_gigabytes(session: Session) -> None:
    """A message that says it has 4 GiB is refused or ends the connection; the next client is served."""
    header = uapi.VFIO_USER_HEADER.pack(1, uapi.VFIO_USER_DEVICE_GET_INFO, 0xFFFFFFFF, 0, 0)
    _after_garbage(session, header, "a message of 4 GiB")


@check(Level.SHOULD, _VALIDATE, fresh=True)
def client_that_leaves_in_a_message(session: Session) -> None:
    """A client that goes away in the middle of a message does no harm: the next one is served."""
    peer, reply = session.hello(version_request(PROPOSED))
    try:
        require(not reply.refused, f"VERSION is refused: {reply.reason}")
        peer.send_bytes(uapi.VFIO_USER_HEADER.pack(1, uapi.VFIO_USER_REGION_WRITE, 4096, 0, 0)[:10])
    finally:
        peer.close()
    _accepted(session, version_request(PROPOSED))
