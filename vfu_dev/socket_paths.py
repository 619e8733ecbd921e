"""Paths of a device's two sockets, each found from the other.

The control socket of a device is `SOCKET.ctl` beside its vfio-user socket, unless `vfu-dev serve --control`
says otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_SUFFIX = ".ctl"


def default_control(socket_path: str | os.PathLike[str]) -> Path:
    """Return the path of the control socket that belongs to a device's socket."""
    return Path(os.fspath(socket_path) + CONTROL_SUFFIX)


def control_path(path: str | os.PathLike[str]) -> Path:
    """Return the control socket meant by `path`: the one beside it where it is a device's socket, or itself.

    PATH.ctl and then PATH with the suffix .ctl are looked for first: a connection to a vfio-user socket would
    take the place of its one client.
    """
    path = Path(path)
    candidates = (default_control(path), path.with_suffix(CONTROL_SUFFIX) if path.name else path)
    return next((beside for beside in candidates if beside.is_socket()), path)


def device_path(path: str | os.PathLike[str]) -> Path:
    """Return the device's socket meant by `path`: the one beside it if it is a control socket, or itself."""
    path = Path(path)
    if path.suffix != CONTROL_SUFFIX:
        return path
    candidates = (path.with_suffix(""), path.with_suffix(".sock"))
    return next((beside for beside in candidates if beside.is_socket()), path)
