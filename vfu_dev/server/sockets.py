"""Paths of UNIX sockets: a dead server's leftover is replaced, a live server's is an error."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from vfu_dev.errors import ConfigError, VfuDevError, shown
from vfu_dev.uapi import UNIX_PATH_MAX

MAX_PATH_BYTES = UNIX_PATH_MAX - 1


def claim_socket_path(path: Path, purpose: str) -> None:
    """Make sure that a socket can be bound at `path`.

    Raises: SocketInUseError: somebody listens there.
            ConfigError: something else lies there, or the path cannot be a socket's.
    """
    if "\0" in os.fspath(path):
        raise ConfigError(f"{purpose} {shown(os.fspath(path))}: a path cannot have a NUL character")
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"{purpose} {path}: longer than the {MAX_PATH_BYTES} bytes of a UNIX socket's path; shorten it"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{purpose} {path}: there is no folder {path.parent}")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as err:
        raise ConfigError(f"{purpose} {path}: {err.strerror}") from err
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{purpose} {path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # EAGAIN: somebody listens, but has no room for one more.
        if probe.connect_ex(os.fspath(path)) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise SocketInUseError(
                f"{purpose} {path}: a server is alive there; stop it or choose another path"
            )
    path.unlink(missing_ok=True)


class SocketInUseError(VfuDevError):
    """A server is alive on the path of a socket."""

    errno = errno.EADDRINUSE


class SpareDescriptor:
    """A file descriptor kept in reserve for when no other is free.

    A client that cannot be accepted stays in the queue, and the listening socket readable: a loop would never
    sleep. So it is accepted in the place of this one, and sent away.
    """

    def __init__(self) -> None:
        self._fd = _open_spare()

    def close(self) -> None:
        """Give it back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def turn_away(self, listener: socket.socket) -> None:
        """Accept a client and close its connection."""
        self.close()
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._fd = _open_spare()


def _open_spare() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


class OwnedPath:
    """A socket path that is removed in the end, if what lies there is still what was bound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = path.lstat()
        self._identity = found.st_dev, found.st_ino

    def remove(self) -> None:
        """Remove the path unless somebody else has taken it over."""
        try:
            found = self.path.lstat()
        except OSError:
            return
        if (found.st_dev, found.st_ino) == self._identity:
            self.path.unlink(missing_ok=True)
