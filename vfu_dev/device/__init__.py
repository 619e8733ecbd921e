"""What a device author writes against; `vfu_dev.device.reference` is a device written so."""

from vfu_dev.device.base import Device, Worker
from vfu_dev.device.bus import Bus, GuestMemory
from vfu_dev.device.counters import Counters
from vfu_dev.device.declare import Msix, Region, Registers
from vfu_dev.device.fields import Access, Field
from vfu_dev.device.identity import PciIdentity
from vfu_dev.device.regions import BarSpace, MemoryBar, MsixBar, RegisterBar
from vfu_dev.exports import publish as _publish
from vfu_dev.migration import StateObject

__all__ = [
    "Access",
    "BarSpace",
    "Bus",
    "Counters",
    "Device",
    "Field",
    "GuestMemory",
    "MemoryBar",
    "Msix",
    "MsixBar",
    "PciIdentity",
    "Region",
    "RegisterBar",
    "Registers",
    "StateObject",
    "Worker",
]

_publish(globals())
