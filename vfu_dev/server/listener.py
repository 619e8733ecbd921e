"""The door of the vfio-user socket: who has connected says who it is before it becomes the client.

A device has one client. Whoever connects is waited for without holding up anybody: the client that is
attached, the control socket, and others that connect. The first one with a whole VERSION message is let in.
Who comes while a client is attached gets EBUSY in reply, after a moment in which that client may be leaving.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path

from vfu_dev import uapi
from vfu_dev.errors import ConfigError
from vfu_dev.server.sockets import OwnedPath, SpareDescriptor, claim_socket_path

logger = logging.getLogger(__name__)

MAX_NEWCOMERS = 16
# How long a connection may say nothing, or half of what it has to say: TRAN_SOCK_TIMEOUT_MS in the library.
SILENT_SECONDS = 5.0
# The same while a client is attached: nothing will come of it.
BUSY_SILENT_SECONDS = 1.0
# How long the next client waits for the last one to be gone: who restarts a VM lets go and connects at once.
BUSY_SECONDS = 0.5
# Far more than a VERSION message has; QEMU's has 120 bytes.
MAX_VERSION_BYTES = 64 << 10

_HEADER = uapi.VFIO_USER_HEADER


class _Newcomer:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.message = bytearray()
        self.wanted = _HEADER.size
        self.whole_since: float | None = None  # when its message was complete

    def receive(self) -> bool:
        """Take what has come, no more than the one message; False when nothing more will come of it.

        Raises:  BlockingIOError: no more is there at the moment.
        """
        while len(self.message) < self.wanted:
            try:
                data = self.connection.recv(self.wanted - len(self.message))
            except BlockingIOError:
                raise
            except OSError:
                return False
            if not data:
                return False
            self.message += data
            if self.wanted == _HEADER.size == len(self.message):
                self.wanted = _HEADER.unpack(self.message)[2]
                if not _HEADER.size <= self.wanted <= MAX_VERSION_BYTES:
                    return False
        return True


class Listener:
    """Listens at `path` for the device's client.

    Args:
        path: where to listen.
        selector: the loop's; its data for our sockets is a callable without arguments.
        occupied: whether a client is attached.
        admit: takes a connection, and its VERSION message.
        name: the device, for logs.

    Raises:  ConfigError: the path cannot be used.
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        occupied: Callable[[], bool],
        admit: Callable[[socket.socket, bytes], None],
        name: str,
    ) -> None:
        claim_socket_path(path, "socket")
        self._selector = selector
        self._occupied = occupied
        self._admit = admit
        self._name = name
        self._newcomers: list[_Newcomer] = []  # in the order in which they came
        self._spare = SpareDescriptor()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(str(path))
            self._socket.listen(MAX_NEWCOMERS)
        except OSError as err:
            self._socket.close()
            self._spare.close()
            raise ConfigError(f"socket {path}: {err.strerror}") from err
        self._path = OwnedPath(path)
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Turn everybody away and remove the socket."""
        for newcomer in list(self._newcomers):
            self._drop(newcomer)
        self._selector.unregister(self._socket)
        self._socket.close()
        self._spare.close()
        self._path.remove()

    def timeout(self) -> float | None:
        """Return in how many seconds `advance` has something to do, None for not before somebody comes."""
        if not self._newcomers:
            return None
        occupied, now = self._occupied(), time.monotonic()
        return max(0.0, min(self._patience(newcomer, occupied) for newcomer in self._newcomers) - now)

    def advance(self) -> None:
        """Let the next one in, and turn those away that have waited long enough."""
        if not self._newcomers:
            return
        for newcomer in list(self._newcomers):
            occupied = self._occupied()
            if newcomer.whole_since is not None and not occupied:
                self._let_in(newcomer)
            elif self._patience(newcomer, occupied) <= time.monotonic():
                self._turn_away(newcomer)

    def _patience(self, newcomer: _Newcomer, occupied: bool) -> float:
        """Return when this one has waited long enough."""
        if newcomer.whole_since is not None:
            return newcomer.whole_since + (BUSY_SECONDS if occupied else 0)
        return newcomer.since + (BUSY_SILENT_SECONDS if occupied else SILENT_SECONDS)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as err:
            if err.errno in (errno.EMFILE, errno.ENFILE):
                self._spare.turn_away(self._socket)
                logger.warning("%s: no file descriptor is free, a client was turned away", self._name)
            return
        connection.setblocking(False)
        if len(self._newcomers) >= MAX_NEWCOMERS:
            # A client says who it is at once, so the one that has said nothing for longest is none.
            self._turn_away(self._newcomers[0])
        newcomer = _Newcomer(connection)
        self._newcomers.append(newcomer)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._ready(newcomer))
        self._ready(newcomer)

    def _ready(self, newcomer: _Newcomer) -> None:
        if newcomer not in self._newcomers or newcomer.whole_since is not None:
            return
        try:
            whole = newcomer.receive()
        except BlockingIOError:
            return
        if not whole:
            if newcomer.message:
                logger.warning("%s: a client was turned away: it sent no VERSION message", self._name)
            self._drop(newcomer)
            return
        newcomer.whole_since = time.monotonic()
        # What else it sends is not ours to receive, and that it hangs up is found out when it is let in.
        self._selector.unregister(newcomer.connection)
        if not self._occupied():
            self._let_in(newcomer)

    def _let_in(self, newcomer: _Newcomer) -> None:
        self._newcomers.remove(newcomer)
        self._admit(newcomer.connection, bytes(newcomer.message))

    def _turn_away(self, newcomer: _Newcomer) -> None:
        if newcomer.whole_since is not None:
            number, command, *_ = _HEADER.unpack_from(newcomer.message)
            flags = uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR
            reply = _HEADER.pack(number, command, _HEADER.size, flags, errno.EBUSY)
            try:
                newcomer.connection.send(reply, socket.MSG_NOSIGNAL)
            except OSError as err:
                logger.debug("%s: a client did not wait for its answer: %s", self._name, err)
            reason = "another one is attached (EBUSY)"
        else:
            seconds = time.monotonic() - newcomer.since
            reason = f"it sent no whole VERSION message in {seconds:.1f} s"
        logger.warning("%s: a client was turned away: %s", self._name, reason)
        self._drop(newcomer)

    def _drop(self, newcomer: _Newcomer) -> None:
        self._newcomers.remove(newcomer)
        if newcomer.whole_since is None:
            self._selector.unregister(newcomer.connection)
        newcomer.connection.close()
