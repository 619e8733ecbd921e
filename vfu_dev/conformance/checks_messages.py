"""The frame: ids, replies, errors, order."""

from __future__ import annotations

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.conformance.model import CheckFailedError, Level, check, require, spec
from vfu_dev.conformance.session import Session

_HEADER = "Header"
_INFO = messages.DEVICE_INFO.pack(messages.DEVICE_INFO.size, 0, 0, 0)
_GET_INFO = uapi.VFIO_USER_DEVICE_GET_INFO
_UNKNOWN_COMMAND = 999


@check(
    Level.MUST,
    spec(
        _HEADER,
        "*Message ID* identifies the message, and is echoed in the command's reply message.",
    ),
)
def message_id_is_echoed(session: Session) -> None:
    """A reply has the message id of its request."""
    for number in (0, 1, 0x7FFF, 0xFFFF):
        session.peer.send(_GET_INFO, _INFO, number=number)
        reply = session.peer.receive("GET_INFO")
        require(reply.id == number, f"the reply to message {number} has id {reply.id}")


@check(
    Level.MUST,
    spec(
        _HEADER,
        "Message IDs belong entirely to the sender, can be re-used (even concurrently) and the receiver must "
        "not make any assumptions about their uniqueness.",
    ),
)
def message_id_may_be_used_twice(session: Session) -> None:
    """Two requests with one id, under way at the same time, get two replies."""
    for _ in range(2):
        session.peer.send(_GET_INFO, _INFO, number=7)
    for _ in range(2):
        reply = session.peer.frame_checked(session.peer.receive("GET_INFO"), 7, _GET_INFO)
        require(not reply.refused, f"GET_INFO is refused: {reply.reason}")


@check(Level.MUST, spec(_HEADER, "It is also set in the reply header."))
def command_is_echoed(session: Session) -> None:
    """A reply names the command of its request."""
    session.peer.send(_GET_INFO, _INFO)
    reply = session.peer.receive("GET_INFO")
    require(reply.command == _GET_INFO, f"the reply to command {_GET_INFO} names {reply.command}")


@check(
    Level.MUST,
    spec(
        _HEADER,
        "Each command message in Commands_ must be replied to with a reply message, unless the message sets "
        "the *No_Reply* bit.",
    ),
)
def no_reply_is_kept_to(session: Session) -> None:
    """A request with No_reply gets none; the one after it does."""
    session.peer.send(_GET_INFO, _INFO, number=1, flags=uapi.VFIO_USER_NO_REPLY)
    session.peer.send(_GET_INFO, _INFO, number=2)
    reply = session.peer.receive("GET_INFO")
    require(reply.id == 2, f"a request with No_reply is answered (message id {reply.id})")


@check(Level.MUST, spec(_HEADER, "If an error occurs, the reply message must only include the reply header."))
def error_is_a_header_alone(session: Session) -> None:
    """An error reply has nothing behind its header."""
    request = messages.REGION_ACCESS.pack(0, 0xFFFF, 4)  # a region that no device has
    number = session.peer.send(uapi.VFIO_USER_REGION_READ, request)
    reply = session.peer.receive("REGION_READ")
    require(reply.id == number, f"the reply has message id {reply.id}, not {number}")
    require(reply.refused, "REGION_READ of region 65535 succeeds")
    require(not reply.payload, f"an error reply with {len(reply.payload)} bytes behind its header")


@check(
    Level.SHOULD,
    spec(_HEADER, "In this case, the *Error* field will be valid."),
)
def error_has_an_errno(session: Session) -> None:
    """An error reply says which error it is."""
    reply = session.ask(uapi.VFIO_USER_REGION_READ, messages.REGION_ACCESS.pack(0, 0xFFFF, 4))
    require(reply.refused, "REGION_READ of region 65535 succeeds")
    require(0 < reply.error < 4096, f"the error is {reply.error}, no errno")


@check(Level.SHOULD, spec(_HEADER, "*Command* specifies the command to be executed, listed in Commands_."))
def command_that_is_unknown(session: Session) -> None:
    """A command that the server does not know is answered with an error."""
    reply = session.ask(_UNKNOWN_COMMAND, bytes(16))
    require(reply.refused, f"command {_UNKNOWN_COMMAND} succeeds")


@check(
    Level.MUST,
    spec("Command Concurrency", "The server will process commands in the order they are received."),
)
def commands_are_taken_in_order(session: Session) -> None:
    """Sixteen requests sent at once are answered in their order."""
    sent = [session.peer.send(_GET_INFO, _INFO) for _ in range(16)]
    answered = [session.peer.receive("GET_INFO").id for _ in sent]
    if answered != sent:
        raise CheckFailedError(f"requests {sent[0]} to {sent[-1]} are answered in the order {answered}")


@check(
    Level.SHOULD,
    spec(
        "Security Considerations",
        "Standard tools and mechanisms should be used on both sides to validate input and prevent against "
        "denial of service scenarios, buffer overflow, etc.",
    ),
)
def request_that_is_too_short(session: Session) -> None:
    """A request with less payload than its structure is refused."""
    for command in (_GET_INFO, uapi.VFIO_USER_DEVICE_GET_REGION_INFO, uapi.VFIO_USER_REGION_READ):
        session.refused(command, bytes(4), what=f"command {command} with 4 bytes of payload")
