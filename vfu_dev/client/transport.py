"""The socket below a vfio-user connection: whole messages out, headers and bodies in, and how it fails.

It blocks only in `poll`, so a sender can receive messages meanwhile. Once the stream can no longer be
trusted it is closed and stays failed; the first reason stays the reason.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from vfu_dev.client.frames import ClientCommandError, DisconnectedError, ReplyTimeoutError
from vfu_dev.errors import ProtocolError, VfuDevError

MAX_FDS = 16  # what QEMU accepts at most (VFIO_USER_MAX_MAX_FDS)


def connect(path: str | os.PathLike[str], timeout_seconds: float) -> socket.socket:
    """Return a socket that is connected to the server which listens on `path`.

    Raises: DisconnectedError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The kernel's own limit (SO_SNDTIMEO) is what a full backlog is waited for: with Python's timeout
        # the socket does not block, and connect() fails at once with EAGAIN.
        limit = struct.pack("@ll", int(timeout_seconds), int(timeout_seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(os.fspath(path))
    except BlockingIOError:
        sock.close()
        reason = f"its queue of clients was full for {timeout_seconds:g} s"
        raise DisconnectedError(f"cannot connect to {os.fspath(path)}: {reason}") from None
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            reason += f"; is a server running there? (vfu-dev serve --socket {os.fspath(path)})"
        raise DisconnectedError(f"cannot connect to {os.fspath(path)}: {reason}") from error
    return sock


class Transport:
    """One socket, owned from here on. Who sends and who receives at a time is the caller's business.

    Args: timeout_seconds: for a message to arrive whole once it has begun.
    """

    def __init__(self, sock: socket.socket, timeout_seconds: float) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.timeout_seconds = timeout_seconds
        self._failure: VfuDevError | None = None
        self._failing = threading.Lock()

    def send(
        self, buffers: list[memoryview], fds: Sequence[int], what: str, make_room: Callable[[], bool]
    ) -> bool:
        """Send one message; return False when nothing of it could be sent by the deadline.

        Args: buffers: its parts; used up. what: the name of the command.
              make_room: waits until more can be sent; False at the deadline.
        Raises: DisconnectedError; ReplyTimeoutError: a part of it was sent, and no more could be.
        """
        rights = []
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        begun = False
        while buffers:
            try:
                sent = self._sock.sendmsg(buffers, rights)
            except BlockingIOError:
                if make_room():
                    continue
                if not begun:
                    return False
                text = f"the server takes no messages ({what} could not be sent whole)"
                raise self.fail(ReplyTimeoutError(text)) from None
            except OSError as error:
                raise self.fail(DisconnectedError(f"the server closed the connection at {what}")) from error
            begun, rights = True, []
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers[0])
                del buffers[0]
            if sent:
                buffers[0] = buffers[0][sent:]
        return True

    def receive_header(self, header: memoryview) -> list[int]:
        """Fill `header`; return the file descriptors that came with its first byte, which the caller owns."""
        fds = array.array("i")
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into(
                [header], socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            count, ancillary, flags = -1, [], 0
        except OSError:
            count, ancillary, flags = 0, [], 0
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        try:
            if count == 0:
                raise self.fail(DisconnectedError("the server closed the connection"))
            if flags & socket.MSG_CTRUNC:
                raise self.broken(f"more than {MAX_FDS} file descriptors in one message")
            self.receive(header[max(count, 0) :])
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return list(fds)

    def receive(self, buffer: memoryview) -> None:
        """Fill `buffer`; a message that has begun must go on within the timeout."""
        deadline = 0.0
        while buffer:
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                deadline = deadline or time.monotonic() + self.timeout_seconds
                if self.poll(select.POLLIN, deadline):
                    continue
                raise self.fail(ReplyTimeoutError("the server stopped in the middle of a message")) from None
            except OSError as error:
                raise self.fail(DisconnectedError("the server closed the connection")) from error
            if count == 0:
                raise self.fail(
                    DisconnectedError("the server closed the connection in the middle of a message")
                )
            buffer = buffer[count:]

    def poll(self, event: int, deadline: float) -> int:
        """Wait for `event` until `deadline` and return what there is; a closed socket counts as ready."""
        left = deadline - time.monotonic()
        poller = select.poll()
        try:
            poller.register(self._sock, event)
        except (OSError, ValueError):  # closed by another thread
            return event
        found = poller.poll(max(0, round(left * 1000 + 0.5)))
        return found[0][1] if found else 0

    # --- failing --------------------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether it was closed or has failed."""
        return self._failure is not None

    def check(self) -> None:
        """Raise why it failed, if it did; a new object each time, which collects no other's traceback."""
        failure = self._failure
        if failure is not None:
            raise failure if isinstance(failure, ClientCommandError) else type(failure)(str(failure))

    def fail(self, error: VfuDevError) -> VfuDevError:
        """Close the socket, and return `error` for the caller to raise."""
        with self._failing:
            if self._failure is None:
                self._failure = error
            # Another thread may be inside poll() on this socket: only shutdown wakes it.
            with contextlib.suppress(OSError):  # not connected any more
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()
        return error

    def broken(self, what: str) -> VfuDevError:
        """Fail because the server sent `what`."""
        return self.fail(ProtocolError(f"the server sent {what}"))
