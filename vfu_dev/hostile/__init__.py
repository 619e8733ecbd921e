"""A vfio-user server that lies, for authors of clients: `vfu-dev hostile`.

`Device` is honest, `LIES` are the ways to change one of its replies, `Server` talks to one client and says in
an `Encounter` what it did about a lie.
"""

from vfu_dev.hostile import lies_attach, lies_data, lies_frame, lies_window
from vfu_dev.hostile.device import Device
from vfu_dev.hostile.lie import LIES, PHASES, Liar, Lie
from vfu_dev.hostile.message import Reply, Request
from vfu_dev.hostile.server import Encounter, Server

__all__ = ["LIES", "PHASES", "Device", "Encounter", "Liar", "Lie", "Reply", "Request", "Server"]

# Each enters its lies into the table when it is imported.
_TABLES = (lies_frame, lies_attach, lies_data, lies_window)
