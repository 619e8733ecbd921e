"""Options of `vfu-dev serve` for its two sockets: where they are, and who may connect."""

from __future__ import annotations

import functools
import grp
import pwd
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vfu_dev.cli.params import ON_OFF, NumberType, Quantity
from vfu_dev.cli.shape import Option
from vfu_dev.errors import ConfigError
from vfu_dev.socket_paths import default_control

if TYPE_CHECKING:
    from vfu_dev.server.door import Access

F = TypeVar("F", bound=Callable[..., Any])

NO_CONTROL = "none"
# (uid_t) -1 and (gid_t) -1, which chown(2) takes for "leave it as it is".
_NOBODY_AT_ALL = (1 << 32) - 1
_NAMES = ("socket_path", "fd", "control_path", "socket_group", "allow_uid", "require_migration")


def _group(text: str) -> int:
    """Return a group's number. Raises: ValueError: there is no such group."""
    try:
        number = int(text) if text.isdecimal() else grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {text!r} here; `getent group` lists them") from None
    if number >= _NOBODY_AT_ALL:
        raise ValueError(f"{number} is no group's number")
    return number


def _user(text: str) -> int:
    """Return a user's number. Raises: ValueError: there is no such user, or it stands for many."""
    from vfu_dev.server.door import overflow_uid

    try:
        number = int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ValueError(f"there is no user {text!r} here; `getent passwd` lists them") from None
    if number >= _NOBODY_AT_ALL:
        raise ValueError(f"{number} is no user's number")
    # In a user namespace (PrivateUsers= of systemd) all users that it does not know arrive under one number.
    if number == overflow_uid():
        raise ValueError(f"{number} stands for every user that this namespace does not know")
    return number


_OPTIONS = (
    click.option(
        "--socket",
        "socket_path",
        cls=Option,
        aliases=["--socket-path"],
        type=click.Path(path_type=Path),
        metavar="SOCKET",
        help="The vfio-user socket, where QEMU connects. It, --fd or a socket from systemd is required.",
    ),
    click.option(
        "--fd",
        type=NumberType(),
        metavar="NUMBER",
        help="Use the inherited file descriptor of this number as the vfio-user socket "
        "instead. The server of a listening socket runs until a signal or `quit` "
        "ends it; on a connected one it ends when its client leaves.",
    ),
    click.option(
        "--control",
        "control_path",
        default=None,
        type=click.Path(path_type=Path),
        metavar="PATH|none",
        help="Path of the control socket, for vfu-dev ctl, top and migrate; none: no control socket.",
        show_default="SOCKET.ctl; none with --fd",
    ),
    click.option(
        "--socket-group",
        type=Quantity("group", "a group, by name or number", _group, str),
        metavar="GROUP",
        help="Let members of this group connect to both sockets, which are then 0660; an error with a "
        "socket that was handed over.",
        show_default="nobody else: both are 0600",
    ),
    click.option(
        "--allow-uid",
        type=Quantity("user", "a user, by name or number", _user, str),
        multiple=True,
        metavar="USER",
        help="Let this user connect to both sockets, repeatable. They are then 0666, and the kernel says who "
        "connects (SO_PEERCRED); root and the server's own user always may.",
    ),
    click.option(
        "--require-migration",
        default="off",
        is_flag=False,
        flag_value="on",
        type=ON_OFF,
        help="Refuse a client that gives no sign that it can migrate the device. QEMU "
        "without this project's patches, and without `vfu-dev attach`, loses the "
        "device's state silently.",
    ),
)


@dataclass(frozen=True)
class Sockets:
    """What the options ask for: a path to listen at, or an inherited socket."""

    client: Path | socket.socket
    control: Path | socket.socket | None
    access: Access
    must_migrate: bool

    def __str__(self) -> str:
        """Where clients connect."""
        return str(self.client) if isinstance(self.client, Path) else f"descriptor {self.client.fileno()}"


def socket_options(function: F) -> F:
    """Add the options to a command; the function gets one dict, `sockets`, for `sockets_of`."""

    @functools.wraps(function)  # click keeps the options so far in the function's dict
    def gather(**arguments: Any) -> Any:
        return function(**arguments, sockets={name: arguments.pop(name) for name in _NAMES})

    wrapped: Any = gather
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def sockets_of(arguments: dict[str, Any]) -> Sockets:
    """Return the sockets that the options, or systemd, ask for.

    Raises:
        click.UsageError: options that cannot stand together, or none that says where.
        ConfigError: the inherited descriptor is no such socket.
    """
    from vfu_dev.server.door import Access
    from vfu_dev.server.inherited import Activation, is_listening, take_over

    path, fd, control = (arguments[name] for name in ("socket_path", "fd", "control_path"))
    if path is not None and fd is not None:
        raise click.UsageError("--socket and --fd: expected one of them")
    if arguments["socket_group"] is not None and arguments["allow_uid"]:
        raise click.UsageError("--socket-group and --allow-uid: expected one of them")
    access = Access(arguments["socket_group"], frozenset(arguments["allow_uid"]))
    handed = Activation() if path is not None or fd is not None else Activation.of_environment()
    client: Path | socket.socket
    if path is not None:
        client = path
    elif fd is not None:
        client = take_over(fd, "--fd")
    elif "device" in handed.fds:
        client = take_over(handed.fds["device"], "LISTEN_FDS: descriptor")
    else:
        raise click.UsageError("Missing option '--socket'.")
    if arguments["socket_group"] is not None and not isinstance(client, Path):
        raise click.UsageError(
            "--socket-group: the vfio-user socket was handed over and keeps its group and mode. Set them "
            "where it is made (systemd: SocketGroup= and SocketMode=0660 of the .socket unit), or use "
            "--allow-uid"
        )
    if control is not None and "control" in handed.fds:
        raise ConfigError(f"--control {control}: systemd has handed over a control socket, too")
    if control is None:
        if "control" in handed.fds:
            control = take_over(handed.fds["control"], "LISTEN_FDS: descriptor")
        elif path is not None:
            control = default_control(path)
    elif control == Path(NO_CONTROL):
        control = None
    if access.users and control is None and not isinstance(client, Path) and not is_listening(client):
        raise click.UsageError(
            "--allow-uid: the descriptor is a connection, so no user can connect any more; hand over a "
            "socket that listens, or leave the option out"
        )
    return Sockets(client, control, access, arguments["require_migration"] == "on")
