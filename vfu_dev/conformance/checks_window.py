"""The window for migration data: what a server takes for one, and what it does with requests about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.client.window import SEALS, DataWindow, sealed_memory
from vfu_dev.conformance.checks_stream import SLICE, ask_read, read, save
from vfu_dev.conformance.model import ADDITIONS, Level, NotApplicableError, Source, check, require
from vfu_dev.conformance.peer import Reply
from vfu_dev.conformance.session import Session
from vfu_dev.uapi import DeviceState

S = DeviceState
_PAGE = 4096
_SIZE = 2 * SLICE
_LAYOUT = messages.MIG_DATA_IN_WINDOW
_NAME = "migration_data_window"


def _source(section: str, quote: str) -> Source:
    return Source(ADDITIONS, section, quote)


_REFUSED = _source(
    "VFIO_USER_MIG_DATA_WINDOW",
    "The server must fail the command with ``EINVAL`` if any of this does not hold, or if the file is not "
    "such that its pages can be used at any time, as described below; and with ``EEXIST`` if there is a "
    "window already.",
)
_FORM = _source(
    "The data window",
    "While there is a window, both ``VFIO_USER_MIG_DATA_READ`` and ``VFIO_USER_MIG_DATA_WRITE`` have a "
    "request payload of the following format, and so does the reply to ``VFIO_USER_MIG_DATA_READ``.",
)


def _offered(session: Session) -> int:
    """Return the largest window that the server takes; the connection is given up after the check."""
    session.need_migration()
    session.peer  # noqa: B018 - negotiates
    found = session.capabilities.get(_NAME)
    if found is None:
        raise NotApplicableError(f"the server does not offer {_NAME}")
    require(isinstance(found, int) and found >= _PAGE, f"{_NAME} is {found!r}, not a number of bytes")
    session.undo.callback(session.drop)
    return int(found)


def _new(session: Session, size: int) -> DataWindow:
    window = DataWindow(size)
    session.undo.callback(window.close)
    return window


def _ask(session: Session, size: int, fds: Sequence[int], *, flags: int = 0) -> Reply:
    request = messages.MIG_DATA_WINDOW.pack(messages.MIG_DATA_WINDOW.size, flags, size)
    return session.ask(uapi.VFIO_USER_MIG_DATA_WINDOW, request, fds)


def _refused(session: Session, size: int, fd: int, what: str) -> None:
    try:
        require(_ask(session, size, [fd]).refused, f"{what} is taken for a window")
    finally:
        os.close(fd)


def _windowed(session: Session) -> DataWindow:
    """Have a window, on a connection that is given up after the check."""
    limit = _offered(session)
    if limit < _SIZE:
        raise NotApplicableError(f"{_NAME} is {limit}, and checks use {_SIZE} bytes")
    window = _new(session, _SIZE)
    reply = _ask(session, _SIZE, [window.fd])
    require(not reply.refused, f"a sealed memfd is refused as a window: {reply.reason}")
    return window


def _request(command: int, session: Session, size: int, offset: int) -> Reply:
    return session.ask(command, _LAYOUT.pack(_LAYOUT.size, size, offset))


def _read(session: Session, window: DataWindow, size: int, offset: int) -> bytes:
    reply = _request(uapi.VFIO_USER_MIG_DATA_READ, session, size, offset)
    require(not reply.refused, f"a read of {size} bytes at {offset} is refused: {reply.reason}")
    require(len(reply.payload) == _LAYOUT.size, f"a reply of {len(reply.payload)} bytes, not {_LAYOUT.size}")
    argsz, found, at = _LAYOUT.unpack(reply.payload)
    require(argsz == _LAYOUT.size and at == offset, f"argsz {argsz}, offset {at} for a read at {offset}")
    require(found <= size, f"{found} bytes for a read of {size}")
    return bytes(window.view[offset : offset + found])


@check(Level.MUST, _source("Version negotiation", "Either number is at least the size of a page."))
def window_size_is_a_number(session: Session) -> None:
    """migration_data_window, where the server has it, is a number of bytes."""
    _offered(session)


@check(Level.MUST, _REFUSED)
def window_is_taken(session: Session) -> None:
    """A sealed memfd is taken, and the reply has no payload."""
    _offered(session)
    window = _new(session, _PAGE)
    reply = _ask(session, _PAGE, [window.fd])
    require(not reply.refused, f"a sealed memfd of a page is refused: {reply.reason}")
    require(not reply.payload, f"{len(reply.payload)} bytes in reply to MIG_DATA_WINDOW")


@check(Level.MUST, _REFUSED)
def window_has_to_be_sealed(session: Session) -> None:
    """Memory that can still shrink, grow or be sealed is refused, as is a file; cutting it harms nobody."""
    _offered(session)
    for seals in (0, *(SEALS & ~(1 << bit) for bit in range(3))):
        fd = sealed_memory(_PAGE, seals)
        own = os.dup(fd)
        try:
            _refused(session, _PAGE, fd, f"a memfd with seals {seals:#x}")
            if not seals:
                os.ftruncate(own, 0)
        finally:
            os.close(own)
    _refused(session, _PAGE, os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC), "/dev/zero")


@check(Level.MUST, _REFUSED)
def window_has_to_be_of_its_size(session: Session) -> None:
    """A file shorter or longer than the window is refused; so are odd, empty and too large windows."""
    limit = _offered(session)
    _refused(session, _SIZE, sealed_memory(_PAGE), "a file shorter than the window")
    _refused(session, _PAGE, sealed_memory(_SIZE), "a file longer than the window")
    _refused(session, 100, sealed_memory(100), "a window of 100 bytes")
    _refused(session, 0, sealed_memory(_PAGE), "a window of no bytes")
    beyond = (limit // _PAGE + 1) * _PAGE
    if beyond < 1 << 40:
        _refused(session, beyond, sealed_memory(beyond), f"a window of {beyond} bytes, above {limit}")


@check(Level.MUST, _source("Request", "The message is accompanied by one file descriptor."))
def window_needs_one_descriptor(session: Session) -> None:
    """A window without a file descriptor, or with two, is refused."""
    _offered(session)
    window = _new(session, _PAGE)
    require(_ask(session, _PAGE, []).refused, "a window without a file descriptor is taken")
    require(_ask(session, _PAGE, [window.fd] * 2).refused, "a window with two file descriptors is taken")


@check(Level.MUST, _REFUSED)
def window_is_made_once(session: Session) -> None:
    """A second window fails with EEXIST."""
    _windowed(session)
    reply = _ask(session, _PAGE, [_new(session, _PAGE).fd])
    require(reply.refused and reply.error == errno.EEXIST, f"a second window: {reply.reason}, not EEXIST")


@check(Level.MUST, _FORM)
def window_has_the_data(session: Session) -> None:
    """The state is read by way of the window, and taken back by way of it."""
    window = _windowed(session)
    session.set_state(S.STOP_COPY)
    data, size = bytearray(), SLICE
    while found := _read(session, window, size, len(data) % 2 * _PAGE):
        data += found
        if len(data) > session.max_state_bytes:
            raise NotApplicableError("the state is larger than --max-state")
    require(bool(data), "the state has no bytes")
    session.set_state(S.RUNNING)
    session.set_state(S.RESUMING)
    for number, at in enumerate(range(0, len(data), size)):
        part, offset = data[at : at + size], number % 2 * _PAGE
        window.view[offset : offset + len(part)] = part
        reply = _request(uapi.VFIO_USER_MIG_DATA_WRITE, session, len(part), offset)
        require(not reply.refused and not reply.payload, f"a write of {len(part)} bytes: {reply.reason}")
    session.set_state(S.STOP)
    session.set_state(S.RUNNING)


@check(
    Level.MUST,
    _source(
        "The data window", "The bytes from *offset* on, *size* of them, must be in the window. Otherwise the "
        "server fails the command with ``EINVAL``.",
    ),
)  # fmt: skip
def window_range_is_checked(session: Session) -> None:
    """Reads and writes of bytes that are not all in the window are refused; nothing of the stream is lost."""
    window = _windowed(session)
    session.set_state(S.STOP_COPY)
    outside = [(1, _SIZE), (2, _SIZE - 1), (_SIZE + 1, 0), (2, (1 << 64) - 1), (1, 1 << 63)]
    first = _read(session, window, 64, 0)
    for size, offset in outside:
        reply = _request(uapi.VFIO_USER_MIG_DATA_READ, session, size, offset)
        require(reply.refused, f"a read of {size} bytes at {offset} of {_SIZE} succeeds")
    second = _read(session, window, 64, 0)
    session.set_state(S.RUNNING)
    session.set_state(S.STOP_COPY)
    both = first + second
    require(_read(session, window, len(both), 0) == both, "a refused read took bytes of the stream")
    session.set_state(S.RUNNING)
    session.set_state(S.RESUMING)
    for size, offset in outside:
        reply = _request(uapi.VFIO_USER_MIG_DATA_WRITE, session, size, offset)
        require(reply.refused, f"a write of {size} bytes at {offset} of {_SIZE} succeeds")


@check(Level.MUST, _FORM)
def window_messages_have_no_data(session: Session) -> None:
    """While there is a window, a request as it is without one is refused."""
    _windowed(session)
    session.set_state(S.STOP_COPY)
    require(ask_read(session, 64).refused, "a MIG_DATA_READ for a reply with data succeeds")


@check(
    Level.MUST,
    _source(
        "Who owns which bytes", "The data of both is undefined then, and nothing else is.",
    ),
)  # fmt: skip
def window_requests_may_overlap(session: Session) -> None:
    """Two reads of the same bytes at a time are both answered, and the server goes on."""
    window = _windowed(session)
    session.set_state(S.STOP_COPY)
    request, peer = _LAYOUT.pack(_LAYOUT.size, SLICE, 0), session.peer
    numbers = [peer.send(uapi.VFIO_USER_MIG_DATA_READ, request) for _ in range(2)]
    for number in numbers:
        peer.frame_checked(peer.receive("MIG_DATA_READ"), number, uapi.VFIO_USER_MIG_DATA_READ)
    _read(session, window, 64, 0)


@check(
    Level.MUST,
    _source(
        "The data window", "It exists from the reply to ``VFIO_USER_MIG_DATA_WINDOW`` to the end of the "
        "connection.",
    ),
)  # fmt: skip
def window_ends_with_its_connection(session: Session) -> None:
    """The next client has migration data in messages."""
    _windowed(session)
    session.drop()
    session.saved = None
    require(bool(save(session)), "the state has no bytes")
    session.set_state(S.STOP_COPY)
    read(session, 64)
