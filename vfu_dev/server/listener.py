"""The door of the vfio-user socket: a connection sends VERSION before it becomes the client.

A device has one client. Waiting for a new connection's VERSION message holds up nothing else: neither the
attached client, nor the control socket, nor other connections. The first connection with a complete VERSION
message becomes the client. One that comes while a client is attached gets EBUSY in reply, after a moment in
which that client may be leaving. One that may not be the client at all gets EACCES or, if it cannot migrate a
device that has to migrate, ENOTSUP.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import selectors
import socket
import time
from collections.abc import Callable

from vfu_dev import uapi
from vfu_dev.server.door import Door

logger = logging.getLogger(__name__)

MAX_NEWCOMERS = 16
# Seconds that a connection may take to send its VERSION message: TRAN_SOCK_TIMEOUT_MS in the library.
SILENT_SECONDS = 5.0
# The same while a client is attached: nothing will come of it.
BUSY_SILENT_SECONDS = 1.0
# Seconds that the next client waits for the last one to leave: a restarted VM disconnects and connects at
# once.
BUSY_SECONDS = 0.5
# Far more than a VERSION message has; QEMU's has 120 bytes.
MAX_VERSION_BYTES = 64 << 10

# Proposed in VERSION by a client that migrates the device (native/qemu/README.md); no other does.
SIGN = "migration_precopy_info"
NO_SIGN = f"the client gives no sign that it can migrate the device: it does not propose {SIGN}"

_HEADER = uapi.VFIO_USER_HEADER
_NUMBERS_BYTES = 4  # major and minor, before the text of a VERSION message


class _Newcomer:
    def __init__(
        self, connection: socket.socket, refusal: str | None = None, since: float | None = None
    ) -> None:
        self.connection = connection
        self.since = time.monotonic() if since is None else since
        self.message = bytearray()
        self.wanted = _HEADER.size
        self.whole_since: float | None = None  # when its message was complete
        self.overdue = False  # its patience was over at the last check
        self.error, self.refusal = errno.EACCES, refusal  # why it may never be the client

    def receive(self) -> bool:
        """Receive what has come, at most the one message; False when the connection will not complete it.

        Raises: BlockingIOError: no more is there at the moment.
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


def _claim(newcomer: _Newcomer) -> tuple[bool, bool]:
    """Return how good a claim to a place it has: whether it may be the client, and has said who it is."""
    return newcomer.refusal is None, newcomer.whole_since is not None


class Listener:
    """Lets clients in, one at a time.

    Args:
        door: where clients connect, at most `MAX_NEWCOMERS` at once, closed with this; or the only connection
            there will ever be.
        selector: the loop's; its data for our sockets is a callable without arguments.
        occupied: whether a client is attached.
        admit: takes a connection, and its VERSION message.
        name: the device, for logs.
        must_migrate: refuse a client that shows no sign that it can migrate the device.
    """

    def __init__(
        self,
        door: Door | socket.socket,
        selector: selectors.BaseSelector,
        occupied: Callable[[], bool],
        admit: Callable[[socket.socket, bytes], None],
        name: str,
        *,
        must_migrate: bool = False,
    ) -> None:
        self._selector = selector
        self._occupied = occupied
        self._admit = admit
        self._name = name
        self._must_migrate = must_migrate
        self._newcomers: list[_Newcomer] = []  # in the order in which they came
        self._door: Door | None = None
        if isinstance(door, Door):
            self._door = door
            selector.register(door, selectors.EVENT_READ, self._accept)
        else:
            door.setblocking(False)
            # The loop reads what it has sent by now: until then nobody can be let in. Nobody waits behind it,
            # so it may take its time.
            self._enter(_Newcomer(door, since=math.inf))

    @property
    def is_over(self) -> bool:
        """Whether no client can connect any more: the only connection is let in, or gone."""
        return self._door is None and not self._newcomers

    def close(self) -> None:
        """Turn everybody away and close the door."""
        for newcomer in list(self._newcomers):
            self._drop(newcomer)
        if self._door is not None:
            self._selector.unregister(self._door)
            self._door.close()

    def timeout(self) -> float | None:
        """Return the seconds until `advance` has work; None: not before a client connects."""
        if not self._newcomers:
            return None
        occupied = self._occupied()
        soonest = min(self._patience(newcomer, occupied) for newcomer in self._newcomers)
        return None if soonest == math.inf else max(0.0, soonest - time.monotonic())

    def advance(self) -> None:
        """Let the next one in, and turn those away that have waited long enough."""
        if not self._newcomers:
            return
        for newcomer in list(self._newcomers):
            occupied = self._occupied()
            if newcomer.whole_since is not None and not occupied:
                self._let_in(newcomer)
            elif self._patience(newcomer, occupied) > time.monotonic():
                continue
            elif newcomer.overdue:
                self._turn_away(newcomer)
            else:
                # Where this process had no processor, what ends the wait may have come meanwhile: the client
                # has left, the message is there. One more turn of the loop checks for that.
                newcomer.overdue = True

    def _patience(self, newcomer: _Newcomer, occupied: bool) -> float:
        """Return when this one has waited long enough."""
        if newcomer.whole_since is not None:
            return newcomer.whole_since + (BUSY_SECONDS if occupied else 0)
        return newcomer.since + (BUSY_SILENT_SECONDS if occupied else SILENT_SECONDS)

    def _accept(self) -> None:
        assert self._door is not None
        connection = self._door.accept()
        if connection is None:
            return
        newcomer = _Newcomer(connection, self._door.access.refusal(connection))
        self._enter(newcomer)
        if len(self._newcomers) > MAX_NEWCOMERS:
            # Who may not be the client goes first. A client says who it is at once, so of the others the one
            # that has said nothing for longest is none.
            self._turn_away(min(self._newcomers, key=_claim))
        self._ready(newcomer)

    def _enter(self, newcomer: _Newcomer) -> None:
        self._newcomers.append(newcomer)
        self._selector.register(newcomer.connection, selectors.EVENT_READ, lambda: self._ready(newcomer))

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
        newcomer.overdue = False
        # Further data is for libvfio-user to receive, and a hang-up is detected when the client is let in.
        self._selector.unregister(newcomer.connection)
        if newcomer.refusal is None and self._must_migrate and not shows_migration(newcomer.message):
            newcomer.error, newcomer.refusal = errno.ENOTSUP, NO_SIGN + " (ENOTSUP, --require-migration)"
        if newcomer.refusal is not None:
            self._turn_away(newcomer)
        elif not self._occupied():
            self._let_in(newcomer)

    def _let_in(self, newcomer: _Newcomer) -> None:
        self._newcomers.remove(newcomer)
        if not shows_migration(newcomer.message):
            logger.info("%s: %s", self._name, NO_SIGN)
        self._admit(newcomer.connection, bytes(newcomer.message))

    def _turn_away(self, newcomer: _Newcomer) -> None:
        if newcomer.whole_since is not None:
            error, reason = newcomer.error, newcomer.refusal
            if reason is None:
                error, reason = errno.EBUSY, "another one is attached (EBUSY)"
            number, command, *_ = _HEADER.unpack_from(newcomer.message)
            flags = uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR
            reply = _HEADER.pack(number, command, _HEADER.size, flags, error)
            try:
                newcomer.connection.send(reply, socket.MSG_NOSIGNAL)
            except OSError as err:
                logger.debug("%s: a client did not wait for its answer: %s", self._name, err)
        else:
            seconds = time.monotonic() - newcomer.since
            reason = newcomer.refusal or f"it sent no complete VERSION message in {seconds:.1f} s"
        logger.warning("%s: a client was turned away: %s", self._name, reason)
        self._drop(newcomer)

    def _drop(self, newcomer: _Newcomer) -> None:
        self._newcomers.remove(newcomer)
        if newcomer.whole_since is None:
            self._selector.unregister(newcomer.connection)
        newcomer.connection.close()


def shows_migration(message: bytes | bytearray) -> bool:
    """Return whether a VERSION message proposes what only a client does that can migrate the device.

    The vfio-user specification has no such capability. QEMU without this project's patches proposes
    `migration` and then loses the device's state silently; a client that knows MIG_GET_PRECOPY_INFO reads all
    of it.
    """
    text = bytes(message[_HEADER.size + _NUMBERS_BYTES :]).partition(b"\0")[0]
    try:
        proposed = json.loads(text).get("capabilities", {})
    except (ValueError, RecursionError, AttributeError):
        return False
    return isinstance(proposed, dict) and proposed.get(SIGN) is True
