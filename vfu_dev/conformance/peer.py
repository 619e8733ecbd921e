"""A client without checks: one connection, messages passed on unchanged, every wait limited.

`vfu_dev.client` rejects a message that breaks the protocol and gives up; this one hands it to the check.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vfu_dev import uapi
from vfu_dev.client.dma import DmaSpace
from vfu_dev.client.frames import HEADER, Buffer, command_name
from vfu_dev.conformance.model import CheckFailedError, ClosedError, NoAnswerError, require
from vfu_dev.errors import VfuDevError, errno_of

MAX_FDS = 16
# No honest message is longer: 64 MiB is the most that QEMU transfers at once.
_MAX_MESSAGE_BYTES = (64 << 20) + (1 << 16)


@dataclass
class Reply:
    """One message of the server's; `fds` are closed with the peer."""

    id: int
    command: int
    size: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether it is an error reply."""
        return bool(self.flags & uapi.VFIO_USER_ERROR)

    @property
    def reason(self) -> str:
        """The errno of an error, in words."""
        return os.strerror(self.error) if 0 < self.error < 4096 else f"error {self.error}"


class Peer:
    """One connection to the server.

    Args: sock: connected; owned from here on.
          dma: answers the server's DMA requests.
          deadline: time.monotonic() at which every wait ends.
    """

    def __init__(self, sock: socket.socket, dma: DmaSpace, deadline: float) -> None:
        self._sock = sock
        self._dma = dma
        self._next_id = 0x100
        self._fds: list[int] = []
        self.deadline = deadline
        self.broken = False  # whether the bytes to come may be out of step with messages

    def close(self) -> None:
        """Close the connection and what was received on it."""
        self.drop_fds()
        self.broken = True
        self._sock.close()

    def drop_fds(self) -> None:
        """Close the file descriptors that came with replies."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())

    # --- sending --------------------------------------------------------------------------------------------

    def send(
        self,
        command: int,
        payload: Buffer = b"",
        *,
        fds: Sequence[int] = (),
        flags: int = 0,
        number: int | None = None,
    ) -> int:
        """Send a request; return its message id."""
        if number is None:
            self._next_id = number = (self._next_id + 1) & 0xFFFF
        header = HEADER.pack(number, command, HEADER.size + len(payload), flags, 0)
        self.send_bytes(header + bytes(payload), fds, command_name(command))
        return number

    def send_bytes(self, data: bytes, fds: Sequence[int] = (), what: str = "bytes") -> None:
        """Send `data`, which need not be a message."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        view = memoryview(data)
        while view:
            self._sock.settimeout(self._left(what))
            try:
                view = view[self._sock.sendmsg([view], rights) :]
            except TimeoutError:
                raise NoAnswerError(f"the server did not take {what}") from None
            except OSError as error:
                self.broken = True
                raise ClosedError(f"the server closed the connection before it took {what}") from error
            rights = []

    def _left(self, what: str) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.broken = True  # the reply may still come, and would be taken for another one's
            raise NoAnswerError(f"no answer to {what} in time")
        return left

    # --- receiving ------------------------------------------------------------------------------------------

    def ask(self, command: int, payload: Buffer = b"", fds: Sequence[int] = ()) -> Reply:
        """Send a request and return its reply, whose frame has been checked."""
        number = self.send(command, payload, fds=fds)
        return self.frame_checked(self.receive(command_name(command)), number, command)

    def frame_checked(self, reply: Reply, number: int, command: int) -> Reply:
        """Return `reply` if it answers the request `number`, `command`."""
        name = command_name(command)
        try:
            require(reply.id == number, f"the reply to {name} has message id {reply.id}, not {number}")
            require(reply.command == command, f"the reply to {name} names {command_name(reply.command)}")
            kind = reply.flags & uapi.VFIO_USER_TYPE
            require(kind == uapi.VFIO_USER_REPLY, f"the reply to {name} is of type {kind:#x}")
            if reply.refused:
                require(
                    not reply.payload, f"an error reply to {name} with {len(reply.payload)} bytes behind it"
                )
        except CheckFailedError:
            self.broken = True
            raise
        return reply

    def receive(self, what: str) -> Reply:
        """Return the next reply; requests of the server are answered meanwhile.

        Raises: NoAnswerError, ClosedError; CheckFailedError: what came is no message.
        """
        while True:
            header, fds = self._exactly(HEADER.size, what)
            number, command, size, flags, error = HEADER.unpack(header)
            if not HEADER.size <= size <= _MAX_MESSAGE_BYTES:
                self.broken = True
                raise CheckFailedError(f"in answer to {what}, a message that says it has {size} bytes")
            payload, more = self._exactly(size - HEADER.size, what)
            message = Reply(number, command, size, flags, error, payload, fds + more)
            if flags & uapi.VFIO_USER_TYPE:
                return message
            self._serve(message)

    def _serve(self, request: Reply) -> None:
        parts: tuple[Buffer, ...] = ()
        refused = 0
        try:
            parts = self._dma.handle(request.command, memoryview(request.payload))
        except VfuDevError as error:
            refused = errno_of(error) or errno.EINVAL
        if request.flags & uapi.VFIO_USER_NO_REPLY:
            return
        flags = uapi.VFIO_USER_REPLY | (uapi.VFIO_USER_ERROR if refused else 0)
        body = b"".join(bytes(part) for part in parts)
        header = HEADER.pack(request.id, request.command, HEADER.size + len(body), flags, refused)
        self.send_bytes(header + body, what=f"the reply to {command_name(request.command)}")

    def _exactly(self, count: int, what: str) -> tuple[bytes, list[int]]:
        data, fds = bytearray(), []
        while len(data) < count:
            self._sock.settimeout(self._left(what))
            try:
                part, received, _, _ = socket.recv_fds(self._sock, min(count - len(data), 1 << 20), MAX_FDS)
            except TimeoutError:
                self.broken = True
                raise NoAnswerError(f"no answer to {what} in time") from None
            except OSError:
                part, received = b"", []
            fds += received
            self._fds += received
            if not part:
                self.broken = True
                raise ClosedError(f"the server closed the connection instead of answering {what}")
            data += part
        return bytes(data), fds

    def quiet(self, seconds: float) -> bool:
        """Return whether nothing comes within `seconds`."""
        self._sock.settimeout(seconds)
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        except OSError:
            return False
