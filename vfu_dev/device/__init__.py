"""The API for device authors; `vfu_dev.device.reference` is a device written with it.

Authors subclass `Device` and declare `Registers`, `Region` and `Msix` in it (see `bar`). `Field` is one
register, `Worker` is the work that the device does by itself. docs/authors.md is the guide.
"""

from vfu_dev.device.bar import NO_BAR, Bar, Msix
from vfu_dev.device.base import Device, Worker
from vfu_dev.device.bus import Bus, GuestMemory
from vfu_dev.device.counters import Counters
from vfu_dev.device.fields import Access, Field
from vfu_dev.device.identity import PciIdentity
from vfu_dev.device.region import Region
from vfu_dev.device.registers import Registers
from vfu_dev.exports import publish as _publish
from vfu_dev.migration import StateObject

__all__ = [
    "NO_BAR",
    "Access",
    "Bar",
    "Bus",
    "Counters",
    "Device",
    "Field",
    "GuestMemory",
    "Msix",
    "PciIdentity",
    "Region",
    "Registers",
    "StateObject",
    "Worker",
]

_publish(globals())
