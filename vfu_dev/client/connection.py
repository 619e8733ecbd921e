"""The frame of vfio-user: headers, ids, file descriptors, replies in any order, requests from the server.

Written from QEMU's docs/interop/vfio-user.rst ("Header", "Read and Write Operations"). A length
from the server is not used before it was compared with the caller's room. Once the stream can no
longer be trusted (a bad header, a stalled message, a reply that fits no request) the connection is closed and
stays failed.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self, TypedDict, Unpack

from vfu_dev import uapi
from vfu_dev.client.frames import (
    HEADER,
    Buffer,
    Call,
    ClientCommandError,
    DisconnectedError,
    Message,
    ReplyTimeoutError,
    command_name,
)
from vfu_dev.client.transport import Transport, connect
from vfu_dev.closing import Closing
from vfu_dev.errors import ProtocolError, VfuDevError, errno_of

DEFAULT_TIMEOUT_SECONDS = 5.0  # QEMU's x-msg-timeout
NOT_VFIO_USER = (
    "the server there speaks JSON, not vfio-user: a control socket of `vfu-dev serve`, or QEMU's QMP; "
    "name the device's socket (that of SOCKET.ctl is SOCKET)"
)


class CallOptions(TypedDict, total=False):
    """How a request is sent and what its reply may bring.

    Attributes:
        reply_bytes: room for the reply's fixed part; a longer reply breaks the connection.
        into: writable bytes that take what follows the fixed part; must stay alive until `wait`.
        fds: file descriptors to send with it.
        max_fds: file descriptors accepted with the reply.
        timeout_seconds: for the reply; the connection's own by default.
    """

    reply_bytes: int
    into: memoryview | None
    fds: Sequence[int]
    max_fds: int
    timeout_seconds: float | None


RequestHandler = Callable[[int, memoryview], tuple[Buffer, ...]]


class Connection(Closing):
    """A vfio-user connection as its client. Threads may share one; replies find their own caller.

    Args: sock: connected AF_UNIX stream socket; owned from here on.
          timeout_seconds: for each reply, and for each message to arrive whole once it has begun.
          max_request_bytes: payload of the largest request accepted from the server.
          handler: answers requests from the server: (command, payload) -> reply parts, or VfuDevError.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_request_bytes: int = uapi.VFIO_USER_DEF_MAX_XFER_BYTES + 16,
        handler: RequestHandler | None = None,
    ) -> None:
        self.max_request_bytes = max_request_bytes
        self.handler = handler
        self._transport = Transport(sock, timeout_seconds)
        self._pending: dict[int, Call] = {}
        self._next_id = 0
        self._state_lock = threading.Lock()  # _pending, _next_id
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._header = bytearray(HEADER.size)
        self._heard = False  # a whole header of the server's
        self._sender = 0  # the thread that holds _send_lock
        self._owed: list[Message] = []  # replies to the server, due when the sender is done

    @classmethod
    def connect(
        cls, path: str | os.PathLike[str], *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    ) -> Self:
        """Connect to the server that listens on `path`.

        Raises: DisconnectedError: nobody listens there.
        """
        return cls(connect(path, timeout_seconds), timeout_seconds=timeout_seconds)

    @property
    def timeout_seconds(self) -> float:
        """How long a reply may take, and a message to arrive whole once it has begun."""
        return self._transport.timeout_seconds

    @timeout_seconds.setter
    def timeout_seconds(self, seconds: float) -> None:
        self._transport.timeout_seconds = seconds

    @property
    def closed(self) -> bool:
        """Whether the connection was closed or has failed."""
        return self._transport.failed

    def close(self) -> None:
        """Close; calls still waiting fail with DisconnectedError. Closing twice is fine."""
        self._transport.fail(DisconnectedError("the connection was closed"))
        with self._state_lock:
            for call in self._pending.values():
                if not call.arriving:
                    call.into = memoryview(b"")  # an error may keep the call, but not the caller's memory
            self._pending.clear()

    def call(self, command: int, *parts: Buffer, **options: Unpack[CallOptions]) -> Call:
        """Send a request and wait for its reply; see `submit` and `wait`."""
        return self.wait(self.submit(command, *parts, **options))

    def submit(
        self,
        command: int,
        *parts: Buffer,
        reply_bytes: int = 0,
        into: memoryview | None = None,
        fds: Sequence[int] = (),
        max_fds: int = 0,
        timeout_seconds: float | None = None,
    ) -> Call:
        """Send a request whose reply `wait` returns; several may be under way.

        Args: parts: the payload, sent one after the other without joining them.
              for the others see `CallOptions`.
        Raises: DisconnectedError, ReplyTimeoutError: it could not be sent.
        """
        seconds = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        call = Call(
            0, command, bytearray(reply_bytes), into or memoryview(b""), max_fds, time.monotonic() + seconds
        )
        with self._state_lock:
            self._transport.check()
            while self._next_id in self._pending:
                self._next_id = (self._next_id + 1) & 0xFFFF
            call.id = self._next_id
            self._next_id = (self._next_id + 1) & 0xFFFF
            self._pending[call.id] = call
        self._send(Message(call.id, command, 0, 0, parts), fds, call.deadline)
        return call

    def post(self, command: int, *parts: Buffer) -> None:
        """Send a request that asks for no reply (No_reply set); errors on the server's side stay unknown."""
        with self._state_lock:
            self._transport.check()
            number = self._next_id
            self._next_id = (self._next_id + 1) & 0xFFFF
        deadline = time.monotonic() + self.timeout_seconds
        self._send(Message(number, command, uapi.VFIO_USER_NO_REPLY, 0, parts), (), deadline)

    def wait(self, call: Call) -> Call:
        """Return `call` once its reply is there.

        Raises: ClientCommandError: the server answered with an error.
                ReplyTimeoutError: no answer; the connection stays usable if it was between two messages.
                DisconnectedError, ProtocolError: the connection is gone, or the server broke the protocol.
        """
        while not call.done:
            left = call.deadline - time.monotonic()
            # One thread at a time reads, one message a turn, for any waiting thread: see `_receive`.
            if left > 0 and self._receive_lock.acquire(timeout=left):
                try:
                    if not call.done:
                        self._transport.check()
                        self._receive(call.deadline)
                finally:
                    self._receive_lock.release()
            elif not call.done:
                self._abandon(call)
        if call.error is not None:
            raise call.error
        return call

    def serve(self, seconds: float) -> None:
        """Answer one request of the server, if one comes in that time; sends nothing but the answer.

        While calls wait for replies, requests are answered anyway. This is for a client with nothing to ask.
        Raises: DisconnectedError, ProtocolError: as for `wait`.
        """
        with self._receive_lock:
            self._transport.check()
            self._receive(time.monotonic() + seconds)

    # --- sending --------------------------------------------------------------------------------------------

    def _send(self, message: Message, fds: Sequence[int], deadline: float) -> None:
        """Send one message, and the replies to the server's requests that came in meanwhile."""
        with self._send_lock:
            self._sender = threading.get_ident()
            try:
                self._send_one(message, fds, deadline)
                while self._owed:
                    self._send_one(self._owed.pop(0), (), deadline)
            finally:
                self._sender = 0

    def _send_one(self, message: Message, fds: Sequence[int], deadline: float) -> None:
        name = command_name(message.command)
        if not self._transport.send(message.buffers(), fds, name, lambda: self._make_room(deadline)):
            with self._state_lock:
                self._pending.pop(message.id, None)
            raise ReplyTimeoutError(f"the server takes no messages ({name} could not be sent)")

    def _make_room(self, deadline: float) -> bool:
        """Wait until more can be sent; False at the deadline.

        Messages are taken meanwhile: a server that is itself blocked on sending us a long reply reads
        nothing, and the thread that the reply is for may be waiting for the send lock.
        """
        if not self._receive_lock.acquire(blocking=False):  # another thread takes them, or this one does
            pause = min(deadline, time.monotonic() + 0.02)
            return bool(self._transport.poll(select.POLLOUT, pause)) or time.monotonic() < deadline
        try:
            events = self._transport.poll(select.POLLIN | select.POLLOUT, deadline)
            if events & ~select.POLLOUT:
                self._receive(deadline)
            return bool(events)
        finally:
            self._receive_lock.release()

    # --- receiving ------------------------------------------------------------------------------------------

    def _receive(self, deadline: float) -> None:
        """Take one whole message off the socket, if one begins before `deadline`."""
        if not self._transport.poll(select.POLLIN, deadline):
            return
        header = memoryview(self._header)
        fds = self._transport.receive_header(header)
        try:
            if not self._heard:
                self._heard = True
                if header[0] == ord("{"):
                    raise self._transport.fail(ProtocolError(NOT_VFIO_USER))
            number, command, size, flags, error = HEADER.unpack(header)
            if size < HEADER.size:
                raise self._transport.broken(f"a message of {size} bytes, less than its header")
            kind = flags & uapi.VFIO_USER_TYPE
            if kind == uapi.VFIO_USER_REPLY:
                self._receive_reply(number, command, size - HEADER.size, flags, error, fds)
            elif kind == 0:
                self._receive_request(number, command, size - HEADER.size, flags)
            else:
                raise self._transport.broken(f"a message of type {kind:#x}")
        finally:
            for fd in fds:
                os.close(fd)

    def _receive_reply(
        self, number: int, command: int, count: int, flags: int, error: int, fds: list[int]
    ) -> None:
        with self._state_lock:
            call = self._pending.get(number)
            if call is not None:
                call.arriving = True
        if call is None:
            raise self._transport.broken(f"a reply to message {number}, which was not sent")
        if command != call.command:
            raise self._transport.broken(
                f"a reply to {command_name(call.command)} that names {command_name(command)}"
            )
        if flags & uapi.VFIO_USER_ERROR:
            if count:
                raise self._transport.broken(
                    f"an error reply to {command_name(command)} with {count} bytes behind its header"
                )
            call.error = ClientCommandError(command, error)
        elif count > (room := len(call.head) + len(call.into)):
            raise self._transport.broken(
                f"{count} bytes in reply to {command_name(command)}, with room for {room}"
            )
        elif len(fds) > call.max_fds:
            raise self._transport.broken(
                f"{len(fds)} file descriptors with the reply to {command_name(command)}"
            )
        else:
            call.head_bytes = min(count, len(call.head))
            call.into_bytes = count - call.head_bytes
            self._transport.receive(memoryview(call.head)[: call.head_bytes])
            # The buffer of an abandoned call may be gone or in use again: read past it.
            target = (
                memoryview(bytearray(call.into_bytes)) if call.abandoned else call.into[: call.into_bytes]
            )
            self._transport.receive(target)
            if not call.abandoned:
                call.fds, fds[:] = list(fds), []
        with self._state_lock:
            self._pending.pop(number, None)  # none where another thread closed meanwhile
        call.done = True

    def _receive_request(self, number: int, command: int, count: int, flags: int) -> None:
        if count > self.max_request_bytes:
            raise self._transport.broken(f"a {command_name(command)} request of {count} bytes")
        payload = memoryview(bytearray(count))
        self._transport.receive(payload)
        parts: tuple[Buffer, ...] = ()
        refused = errno.ENOSYS
        if self.handler is not None:
            try:
                parts = self.handler(command, payload)
                refused = 0
            except VfuDevError as error:
                refused = errno_of(error)
        if flags & uapi.VFIO_USER_NO_REPLY:
            return
        reply_flags = uapi.VFIO_USER_REPLY | (uapi.VFIO_USER_ERROR if refused else 0)
        reply = Message(number, command, reply_flags, refused, parts)
        if self._sender == threading.get_ident():  # in the middle of a message of this client
            self._owed.append(reply)
        else:
            self._send(reply, (), time.monotonic() + self.timeout_seconds)

    # --- failing --------------------------------------------------------------------------------------------

    def _abandon(self, call: Call) -> None:
        """Give up waiting; a reply that comes late is read and dropped."""
        with self._state_lock:
            if call.arriving:  # another thread is filling the caller's buffer: not ours to give back yet
                call.deadline = time.monotonic() + self.timeout_seconds
                return
            call.abandoned = True
        raise ReplyTimeoutError(
            f"no reply to {command_name(call.command)} within {self.timeout_seconds:g} s "
            "(is the server busy with another client, or stuck?)"
        )
