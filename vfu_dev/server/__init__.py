"""One event loop over a vfio-user socket, a control socket and signals; one thread touches the device."""

from vfu_dev.server.control import ControlSocket
from vfu_dev.server.server import Server

__all__ = ["ControlSocket", "Server"]
