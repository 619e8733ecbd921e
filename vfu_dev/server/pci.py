"""What the PCI bus sees of a device: identity, capabilities, BAR flags; <linux/pci_regs.h>."""

from __future__ import annotations

from collections.abc import Callable

from vfu_dev.device import Device, MsixBar
from vfu_dev.libvfio_user import Context

_PCI_COMMAND = 0x04
_PCI_COMMAND_MASTER = 0x4
_PCI_BASE_ADDRESS_0 = 0x10
_PCI_CAP_ID_PM = 0x01
_PCI_CAP_ID_MSIX = 0x11
_PCI_PM_CAP_VERSION_3 = 3
_PCI_PM_CTRL_NO_SOFT_RESET = 0x0008


def set_up_identity(context: Context, device: Device) -> None:
    """Make the context a PCI function with `device`'s ids, and serve its configuration space."""
    identity = device.identity
    context.setup_pci(
        identity.vendor,
        identity.device,
        identity.class_code,
        identity.revision,
        identity.subsystem_ids,
    )
    context.setup_config_region()


def add_capabilities(context: Context, device: Device) -> None:
    """Add the capabilities that `device` has, and announce their interrupts."""
    for bar in device.bars:
        if isinstance(bar, MsixBar):
            context.add_capability(msix_capability(bar))
            context.setup_msix(bar.vectors)
    context.add_capability(power_management_capability())


def set_bar_flags(context: Context, device: Device) -> None:
    """Say of each BAR what it is: width and prefetchability; its size is the region's."""
    config = context.config_space()
    for bar in device.bars:
        config[_PCI_BASE_ADDRESS_0 + 4 * bar.index] |= bar.bar_flags


def bus_master(context: Context) -> Callable[[], bool]:
    """Return what tells whether the command register lets the device reach guest memory."""
    config = context.config_space()
    return lambda: bool(config[_PCI_COMMAND] & _PCI_COMMAND_MASTER)


def msix_capability(bar: MsixBar) -> bytes:
    """Return the MSI-X capability: id, next, message control, table and PBA offsets with the BAR's index."""
    return (
        bytes([_PCI_CAP_ID_MSIX, 0])
        + (bar.vectors - 1).to_bytes(2, "little")
        + (bar.TABLE_OFFSET | bar.index).to_bytes(4, "little")
        + (bar.PBA_OFFSET | bar.index).to_bytes(4, "little")
    )


def power_management_capability() -> bytes:
    """Return a power management capability with D0 and D3hot that loses nothing on the way back to D0."""
    return (
        bytes([_PCI_CAP_ID_PM, 0])
        + _PCI_PM_CAP_VERSION_3.to_bytes(2, "little")
        + _PCI_PM_CTRL_NO_SOFT_RESET.to_bytes(2, "little")
        + bytes(2)
    )
