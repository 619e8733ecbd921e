"""A vfio-user client, written from the specification; tests, load generators and the migrator use it.

`VfioUserDevice` is the device behind a socket, `Migrator` moves the state of one into another, and
`ControlClient` talks to a server's control socket.
"""

from vfu_dev.client.connection import Connection
from vfu_dev.client.control import ControlClient, ControlError
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.frames import ClientCommandError, DisconnectedError, ReplyTimeoutError
from vfu_dev.client.migrator import ClientOptions, ClientProgress, MigrationError, Migrator
from vfu_dev.exports import publish as _publish

__all__ = [
    "ClientCommandError",
    "ClientOptions",
    "ClientProgress",
    "Connection",
    "ControlClient",
    "ControlError",
    "DisconnectedError",
    "MigrationError",
    "Migrator",
    "ReplyTimeoutError",
    "VfioUserDevice",
]

_publish(globals())
