"""Listening UNIX sockets: who may connect, where the socket comes from, and what is removed in the end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.errors import ConfigError
from vfu_dev.server.inherited import is_listening
from vfu_dev.server.sockets import OwnedPath, SpareDescriptor, claim_socket_path

logger = logging.getLogger(__name__)

_OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")
_DEFAULT_OVERFLOW_UID = 65534  # DEFAULT_OVERFLOWUID of <linux/highuid.h>
_UCRED = struct.Struct("=iII")  # struct ucred of <linux/socket.h>: pid, uid, gid
_ROOT = 0


def overflow_uid() -> int:
    """Return the number under which every user arrives that this user namespace does not know."""
    try:
        return int(_OVERFLOW_UID.read_text())
    except OSError:  # ProcSubset=pid of systemd leaves no /proc/sys
        return _DEFAULT_OVERFLOW_UID


@dataclass(frozen=True)
class Access:
    """Who may connect: the server's own user, root, and those named here.

    Attributes:
        group: number of a group whose members may; the socket's mode is 0660 then.
        users: numbers of further users. The mode is 0666 then, and the kernel says who connects
            (SO_PEERCRED).
    """

    group: int | None = None
    users: frozenset[int] = frozenset()

    @property
    def mode(self) -> int:
        """The permission bits of the socket's path."""
        if self.users:
            return 0o666
        return 0o600 if self.group is None else 0o660

    def refusal(self, connection: socket.socket) -> str | None:
        """Return why the peer of `connection` may not use the socket; None if it may."""
        if not self.users:
            return None  # the mode of the path has refused all others
        _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        # The server's own user may be one that its namespace does not know: then so may anybody.
        if uid in {_ROOT, os.geteuid(), *self.users} and uid != overflow_uid():
            return None
        return f"user {uid} may not connect, see --allow-uid (EACCES)"


# Nobody else: the default.
OWNER = Access()


class Door:
    """A listening socket. It is closed, and its path removed, by `close`.

    Args:
        listener: listens, and does not block.
        purpose: what it is for, in logs and errors.
        access: who may connect.
        path: what to remove at the end; None for an inherited socket.
    """

    def __init__(
        self, listener: socket.socket, purpose: str, access: Access, path: OwnedPath | None = None
    ) -> None:
        self._listener = listener
        self._purpose = purpose
        self._path = path
        self._spare = SpareDescriptor()
        self.access = access

    @classmethod
    def at(cls, path: Path, purpose: str, backlog: int, access: Access = OWNER) -> Door:
        """Listen at `path`.

        Raises:
            ConfigError: the path cannot be used, or the group not be given.
            SocketInUseError: somebody listens there.
        """
        claim_socket_path(path, purpose)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(listener.close)
            try:
                # The mode has to hold from the first moment on, so it cannot be a chmod afterwards. Nobody
                # can connect before the socket listens, and by then the group is the right one.
                with restrictive_umask(access.mode):
                    listener.bind(os.fspath(path))
                owned = OwnedPath(path)
                undo.callback(owned.remove)
                give_to_group(path, access)
                listener.listen(backlog)
            except OSError as err:
                raise ConfigError(f"{purpose} {path}: {err.strerror}") from err
            door = cls(listener, purpose, access, owned)
            undo.pop_all()
        return door

    def fileno(self) -> int:
        """Return the descriptor that is readable when somebody has connected."""
        return self._listener.fileno()

    def accept(self) -> socket.socket | None:
        """Return the next connection, non-blocking; None when there is none, or it cannot be accepted."""
        try:
            connection, _ = self._listener.accept()
        except OSError as err:
            if err.errno in (errno.EMFILE, errno.ENFILE):
                self._spare.turn_away(self._listener)
                logger.warning(
                    "%s: no file descriptor is free, a client was turned away (see ulimit -n)", self._purpose
                )
            return None
        connection.setblocking(False)
        return connection

    def close(self) -> None:
        """Listen no longer."""
        self._listener.close()
        self._spare.close()
        if self._path is not None:
            self._path.remove()


@contextlib.contextmanager
def restrictive_umask(mode: int) -> Iterator[None]:
    """Set the umask so that files made meanwhile get at most the permissions of `mode`."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


def give_to_group(path: Path, access: Access) -> None:
    """Give the socket at `path` to the group of `access`, if it has one.

    Raises: ConfigError: this process may not.
    """
    if access.group is None:
        return
    try:
        os.chown(path, -1, access.group, follow_symlinks=False)
    except OSError as err:
        raise ConfigError(
            f"--socket-group {access.group}: {path} cannot be given to it: {err.strerror}; the server "
            "has to be root, or a member of the group"
        ) from err


def client_door(where: Path | socket.socket, backlog: int, access: Access) -> Door | socket.socket:
    """Return the door of the vfio-user socket, or the connection that takes its place.

    Raises: ConfigError, SocketInUseError: see `Door.at`.
    """
    if isinstance(where, Path):
        return Door.at(where, "socket", backlog, access)
    return Door(where, "socket", access) if is_listening(where) else where


def control_door(where: Path | socket.socket, backlog: int, access: Access) -> Door:
    """Return the door of the control socket.

    Raises: ConfigError, SocketInUseError: see `Door.at`; or it is a connection.
    """
    if isinstance(where, Path):
        return Door.at(where, "control socket", backlog, access)
    if not is_listening(where):
        raise ConfigError(
            f"control socket: descriptor {where.fileno()} is a connection; one that listens is needed"
        )
    return Door(where, "control socket", access)


def path_for_foreign(where: Path | socket.socket, access: Access, *, must_migrate: bool) -> Path:
    """Return the path on which a foreign library is to listen, by itself and for every user.

    Raises: ConfigError: more than that is asked of it.
    """
    if not isinstance(where, Path) or access.users or must_migrate:
        raise ConfigError(
            "--fd, --allow-uid and --require-migration need our libvfio-user (vfu-dev build libvfio-user): "
            "any other creates the socket itself, and the socket's mode alone decides who may connect"
        )
    claim_socket_path(where, "socket")
    return where
