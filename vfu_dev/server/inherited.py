"""Sockets inherited from the process that starts the server: `--fd`, and systemd's socket activation."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from vfu_dev.errors import ConfigError

_FIRST_FD = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_NAMES = ("device", "control")


def take_over(fd: int, purpose: str) -> socket.socket:
    """Return the socket with the number `fd`, which no child of this process inherits further.

    Raises: ConfigError: it is no UNIX stream socket.
    """
    try:
        # The kernel says what family and type it has.
        found = socket.socket(fileno=fd)
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not the number of a file descriptor"
        raise ConfigError(f"{purpose} {fd}: not an inherited socket: {reason}") from err
    if (found.family, found.type & ~socket.SOCK_NONBLOCK) != (socket.AF_UNIX, socket.SOCK_STREAM):
        found.detach()
        raise ConfigError(
            f"{purpose} {fd}: a UNIX stream socket is needed, because the protocol passes descriptors"
        )
    found.set_inheritable(False)
    found.setblocking(False)
    return found


def is_listening(found: socket.socket) -> bool:
    """Return whether the socket listens; otherwise it is a client's connection."""
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@dataclass
class Activation:
    """What systemd handed over, see sd_listen_fds(3)."""

    fds: dict[str, int] = field(default_factory=dict)  # "device" or "control" -> number

    @classmethod
    def of_environment(cls) -> Activation:
        """Take what LISTEN_FDS is about, and the variables out of the environment.

        Sockets whose FileDescriptorName= is `device` or `control` are that; others are the device's and the
        control socket, in this order.

        Raises: ConfigError: there are more than two, or two of one name.
        """
        pid, count, names = (
            os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
        )
        if pid != str(os.getpid()) or not count.isdigit():
            return cls()
        called = names.split(":") if names else []
        numbers = range(_FIRST_FD, _FIRST_FD + int(count))
        if any(name in _NAMES for name in called):
            fds = {name: fd for name, fd in zip(called, numbers, strict=False) if name in _NAMES}
        else:
            fds = dict(zip(_NAMES, numbers, strict=False))
        if len(fds) != len(numbers):
            raise ConfigError(
                f"LISTEN_FDS={count}, LISTEN_FDNAMES={names}: the sockets of one device are `device` and "
                "`control`, each once"
            )
        return cls(fds)
