"""What a device author writes against, and the reference device built on it."""

from vfu_dev.device.base import Counters, Device, PciIdentity, Worker
from vfu_dev.device.declare import Msix, Region, Registers
from vfu_dev.device.fields import Access, Field
from vfu_dev.device.reference import MemorySpec, ReferenceDevice
from vfu_dev.device.regions import BarSpace, MemoryBar, MsixBar, RegisterBar

__all__ = [
    "Access",
    "BarSpace",
    "Counters",
    "Device",
    "Field",
    "MemoryBar",
    "MemorySpec",
    "Msix",
    "MsixBar",
    "PciIdentity",
    "ReferenceDevice",
    "Region",
    "RegisterBar",
    "Registers",
    "Worker",
]
