"""A driver for the reference device over VFIO, for tests inside."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from inside import Served
from vfio import CONFIG, Device

PCI_COMMAND, MEMORY_AND_MASTER = 0x04, 0x06
TO_DEVICE, TO_GUEST, FILL_GUEST, FILL_DEVICE, CHECKSUM_GUEST = (
    1,
    2,
    3,
    4,
    5,
)  # vfu_dev/device/reference/layout.py: Op
DONE, UNMAPPED, FORBIDDEN, FAILED = 2, 6, 7, 10  # and Status
MEMORY_BAR = 2


def until(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    """Wait for a condition, asked for every few milliseconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.002)


class Driver:
    """Registers by name, and one DMA operation at a time."""

    def __init__(self, device: Device, served: Served) -> None:
        self.device = device
        self.registers = served.registers
        device.write(CONFIG, PCI_COMMAND, struct.pack("<H", MEMORY_AND_MASTER))

    def __getitem__(self, name: str) -> int:
        offset, size = self.registers[name]
        return int.from_bytes(self.device.read(0, offset, size), "little")

    def __setitem__(self, name: str, value: int) -> None:
        offset, size = self.registers[name]
        self.device.write(0, offset, value.to_bytes(size, "little"))

    def dma(self, op: int, address: int, length: int, offset: int = 0, value: int = 0) -> int:
        """Carry out one operation and return its status."""
        self["desc_op"], self["desc_flags"] = op, 0
        self["desc_address"], self["desc_offset"] = address, offset
        self["desc_length"], self["desc_value"] = length, value
        self["desc_ctrl"] = 1
        until(lambda: self["desc_status"] > 1, "the operation ends")
        return self["desc_status"]

    def fill(self, address: int, length: int, value: int = 0x5A5A5A5A5A5A5A5A) -> int:
        """Have the device write to guest memory."""
        return self.dma(FILL_GUEST, address, length, value=value)
