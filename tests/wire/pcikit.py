"""Configuration space through the client: registers by their offsets, capabilities by their numbers."""

from __future__ import annotations

from vfu_dev.client import VfioUserDevice
from vfu_dev.uapi import VFIO_PCI_CONFIG_REGION_INDEX

# <linux/pci_regs.h>
COMMAND, STATUS, CACHE_LINE_SIZE, BAR0, CAPABILITY_LIST, INTERRUPT_LINE = 0x04, 0x06, 0x0C, 0x10, 0x34, 0x3C
CAP_PM, CAP_EXP, CAP_MSIX = 0x01, 0x10, 0x11
PM_CTRL, EXP_DEVCTL, EXP_LNKCTL, MSIX_FLAGS = 4, 8, 0x10, 2
DEVCTL_FLR = 0x8000


def read(device: VfioUserDevice, offset: int, size: int = 2) -> int:
    """Return a register."""
    return int.from_bytes(device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, offset, size), "little")


def write(device: VfioUserDevice, offset: int, value: int, size: int = 2) -> None:
    """Write a register."""
    device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, offset, value.to_bytes(size, "little"))


def capabilities(device: VfioUserDevice) -> dict[int, int]:
    """Return the number and offset of each capability, in the order of the list."""
    found: dict[int, int] = {}
    offset = read(device, CAPABILITY_LIST, 1)
    while offset:
        assert offset not in found.values(), "the list of capabilities is a ring"
        found[read(device, offset, 1)] = offset
        offset = read(device, offset + 1, 1)
    return found


def function_reset(device: VfioUserDevice) -> None:
    """Initiate a function level reset as a guest's kernel does."""
    control = capabilities(device)[CAP_EXP] + EXP_DEVCTL
    write(device, control, read(device, control) | DEVCTL_FLR)
