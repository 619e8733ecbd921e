"""The configuration space of a device: identity, BARs and capabilities.

Names and offsets are those of <linux/pci_regs.h>. The layout is the same for every device of a kind, because
QEMU compares what cannot be written when it restores a migrated configuration space.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from vfu_dev.device import Device, Msix
from vfu_dev.device.base import RefusedAccessError
from vfu_dev.device.config_space import CONVENTIONAL_BYTES, EXPRESS_BYTES, ConfigSpace
from vfu_dev.libvfio_user import Context, ResetKind
from vfu_dev.uapi import VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX

_PCI_COMMAND_MEMORY = 0x2
_PCI_COMMAND_MASTER = 0x4
_PCI_COMMAND_PARITY = 0x40
_PCI_COMMAND_SERR = 0x100
_PCI_COMMAND_INTX_DISABLE = 0x400
_PCI_STATUS_CAP_LIST = 0x10
_PCI_BASE_ADDRESS_0 = 0x10
_PCI_CAPABILITY_LIST = 0x34
_PCI_STD_HEADER_SIZEOF = 0x40

_PCI_CAP_ID_PM = 0x01
_PCI_PM_SIZEOF = 8
_PCI_PM_CAP_VERSION_3 = 3
_PCI_PM_CTRL_STATE_MASK = 0x3
_PCI_PM_CTRL_NO_SOFT_RESET = 0x8
_D0, _D3_HOT = 0, 3

_PCI_CAP_ID_EXP = 0x10
_PCI_CAP_EXP_SIZEOF = 0x3C
_PCI_EXP_FLAGS_VERSION_2 = 2  # and type 0 in the bits above: an endpoint
_PCI_EXP_DEVCAP_RBER = 0x8000
_PCI_EXP_DEVCAP_FLR = 0x10000000
# What a function starts with: relaxed ordering, no snoop, reads of 512 bytes (PCI Express 7.5.3.4).
_DEVCTL_INITIAL = 0x2810
# All but what the capabilities deny: extended tags, phantom functions, auxiliary power.
_DEVCTL_WRITABLE = 0x78FF
_PCI_EXP_DEVCTL_BCR_FLR = 0x8000
# A link of 5 GT/s and four lanes, without power management, that has been trained to just that.
_LINK = 0x2 | 4 << 4
_PCI_EXP_LNKCAP_ASPM_OPTIONALITY = 1 << 22
_PCI_EXP_LNKSTA_SLC = 0x1000
_LNKCTL_WRITABLE = 0x00CB  # ASPM, read completion boundary, common clock, extended synch
_PCI_EXP_DEVCAP2_COMP_TMOUT_DIS = 0x10
_LNKCAP2_SPEEDS = 0b11 << 1  # 2.5 and 5 GT/s

_PIN_A = 1
_PCI_STATUS_INTERRUPT = 0x8

_PCI_CAP_ID_MSI = 0x05
_PCI_CAP_MSI_SIZEOF = 24
_MSI_LAYOUT = 0x80 | 0x100  # PCI_MSI_FLAGS_64BIT | PCI_MSI_FLAGS_MASKBIT
_MSI_WRITABLE = 0x01 | 0x70  # PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE
_ALL_64_BITS = (1 << 64) - 1

_PCI_CAP_ID_MSIX = 0x11
_PCI_CAP_MSIX_SIZEOF = 12
_MSIX_WRITABLE = 0x8000 | 0x4000  # PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL


def set_up(context: Context, device: Device) -> None:
    """Lay out `device`'s configuration space and have the context serve it."""
    config = device.config
    config.size_bytes = EXPRESS_BYTES if device.express else CONVENTIONAL_BYTES
    _add_header(config, device)
    _add_bars(config, device)
    capabilities = _Capabilities(config)
    _add_power_management(capabilities)
    if device.express:
        _add_express(capabilities, context)
    if context.irqs.all_kinds:
        _add_line(config, device, context)
        if device.msi_messages:
            _add_msi(capabilities, device.msi_messages)
            context.irqs.announce(VFIO_PCI_MSI_IRQ_INDEX, device.msi_messages)
    for bar in device.bars:
        if isinstance(bar, Msix):
            _add_msix(capabilities, bar)
            context.irqs.announce(VFIO_PCI_MSIX_IRQ_INDEX, bar.vectors)
    context.setup_pci(express=device.express)
    context.setup_config_region(config.size_bytes, _handler(device))


def is_bus_master(config: ConfigSpace) -> bool:
    """Return whether the function may reach guest memory: bus master enable is set, and it is in D0."""
    powered = config["pm_control"] & _PCI_PM_CTRL_STATE_MASK == _D0
    return powered and bool(config["command"] & _PCI_COMMAND_MASTER)


def is_line_disabled(config: ConfigSpace) -> bool:
    """Return whether the guest forbids INTx."""
    return bool(config["command"] & _PCI_COMMAND_INTX_DISABLE)


def show_line(config: ConfigSpace, pending: bool) -> None:
    """Show in the status register whether INTx is asserted, or would be if it were not disabled."""
    config["status"] = _PCI_STATUS_CAP_LIST | (_PCI_STATUS_INTERRUPT if pending else 0)


def _handler(device: Device) -> Callable[[memoryview, int, bool], None]:
    """Return the function that every access to configuration space goes through.

    It is served in every migration state: QEMU itself writes it while the device is RESUMING.
    """
    config, size = device.config, device.config.size_bytes

    def access(data: memoryview, offset: int, is_write: bool) -> None:
        if offset < 0 or offset > size or len(data) > size - offset:
            raise RefusedAccessError("config", offset, len(data), f"beyond {size} bytes", errno.EINVAL)
        if is_write:
            config.write(offset, data)
        else:
            config.read(offset, data)

    return access


def _add_header(config: ConfigSpace, device: Device) -> None:
    identity = device.identity
    subsystem_vendor, subsystem = identity.subsystem_ids
    config.register("vendor_id", 0x00, 2, identity.vendor)
    config.register("device_id", 0x02, 2, identity.device)
    command = _PCI_COMMAND_MEMORY | _PCI_COMMAND_MASTER | _PCI_COMMAND_PARITY | _PCI_COMMAND_SERR
    config.register("command", 0x04, 2, writable=command | _PCI_COMMAND_INTX_DISABLE)
    config.register("status", 0x06, 2, _PCI_STATUS_CAP_LIST)
    config.register("revision", 0x08, 1, identity.revision)
    config.register("class_code", 0x09, 3, identity.class_code)
    config.register("cache_line_size", 0x0C, 1, writable=0xFF)
    config.register("subsystem_vendor_id", 0x2C, 2, subsystem_vendor)
    config.register("subsystem_id", 0x2E, 2, subsystem)
    config.register("interrupt_line", 0x3C, 1, writable=0xFF)
    config.register("interrupt_pin", 0x3D, 1)


def _add_bars(config: ConfigSpace, device: Device) -> None:
    for bar in device.bars:
        # `judge_place` has made sure that no other BAR has one of these registers.
        address_bits = (-bar.bar_bytes & ((1 << 64) - 1)) & ~0xF
        for number in bar.bar_registers:
            flags = bar.bar_flags if number == bar.index else 0
            config.register(
                f"bar{number}", _PCI_BASE_ADDRESS_0 + 4 * number, 4, flags, address_bits & 0xFFFFFFFF
            )
            address_bits >>= 32


class _Capabilities:
    """The list of capabilities: each gets the next free place and a link from the one before."""

    def __init__(self, config: ConfigSpace) -> None:
        self.config = config
        self._link, self._free = _PCI_CAPABILITY_LIST, _PCI_STD_HEADER_SIZEOF

    def add(self, number: int, size: int) -> int:
        """Append capability `number` of `size` bytes, header included; returns its offset."""
        offset = self._free
        self.config.register(f"capability_{number:#x}", offset, 1, number)
        self.config.register(f"link_at_{self._link:#x}", self._link, 1, offset)
        self._link, self._free = offset + 1, offset + (size + 3 & ~3)
        return offset


def _add_power_management(capabilities: _Capabilities) -> None:
    """Add power management with D0 and D3hot that loses nothing on the way back to D0."""
    config = capabilities.config
    offset = capabilities.add(_PCI_CAP_ID_PM, _PCI_PM_SIZEOF)
    config.register("pm_capabilities", offset + 2, 2, _PCI_PM_CAP_VERSION_3)
    config.register("pm_control", offset + 4, 2, _PCI_PM_CTRL_NO_SOFT_RESET, _PCI_PM_CTRL_STATE_MASK)

    def written(before: int, _: int) -> None:
        # A state that is not supported changes nothing: PCI Bus Power Management Specification 1.2, 3.2.4.
        if config["pm_control"] & _PCI_PM_CTRL_STATE_MASK not in (_D0, _D3_HOT):
            config["pm_control"] = before

    config.on_write("pm_control", written)


def _add_express(capabilities: _Capabilities, context: Context) -> None:
    """Add the PCI Express capability of an endpoint with function level reset.

    QEMU makes it an integrated endpoint, without the link, where it sits on the root bus.
    """
    config = capabilities.config
    offset = capabilities.add(_PCI_CAP_ID_EXP, _PCI_CAP_EXP_SIZEOF)
    config.register("express_flags", offset + 0x02, 2, _PCI_EXP_FLAGS_VERSION_2)
    config.register("device_capabilities", offset + 0x04, 4, _PCI_EXP_DEVCAP_RBER | _PCI_EXP_DEVCAP_FLR)
    config.register("device_control", offset + 0x08, 2, _DEVCTL_INITIAL, _DEVCTL_WRITABLE)
    config.register("link_capabilities", offset + 0x0C, 4, _LINK | _PCI_EXP_LNKCAP_ASPM_OPTIONALITY)
    config.register("link_control", offset + 0x10, 2, writable=_LNKCTL_WRITABLE)
    config.register("link_status", offset + 0x12, 2, _LINK | _PCI_EXP_LNKSTA_SLC)
    config.register("device_capabilities_2", offset + 0x24, 4, _PCI_EXP_DEVCAP2_COMP_TMOUT_DIS)
    config.register("device_control_2", offset + 0x28, 2, writable=_PCI_EXP_DEVCAP2_COMP_TMOUT_DIS)
    config.register("link_capabilities_2", offset + 0x2C, 4, _LNKCAP2_SPEEDS)
    config.register("link_control_2", offset + 0x30, 2, _LINK & 0xF, 0xF)

    def written(_: int, value: int) -> None:
        if value & _PCI_EXP_DEVCTL_BCR_FLR:
            context.reset(ResetKind.PCI_FLR)

    config.on_write("device_control", written)


def _add_line(config: ConfigSpace, device: Device, context: Context) -> None:
    """Have interrupt pin A, its state in the status register, and INTx Disable, where the device has INTx."""
    interrupts = device.interrupts
    if not interrupts.has_line:
        return
    config.register("interrupt_pin", 0x3D, 1, _PIN_A)
    context.irqs.announce(VFIO_PCI_INTX_IRQ_INDEX, 1)
    config.on_write("command", lambda _before, _written: interrupts.update_line())


def _add_msi(capabilities: _Capabilities, messages: int) -> None:
    """Add MSI with a mask bit for each message; the client masks, and sends the messages."""
    config = capabilities.config
    offset = capabilities.add(_PCI_CAP_ID_MSI, _PCI_CAP_MSI_SIZEOF)
    order = messages.bit_length() - 1
    config.register("msi_control", offset + 2, 2, _MSI_LAYOUT | order << 1, _MSI_WRITABLE)
    config.register("msi_address", offset + 4, 8, writable=_ALL_64_BITS & ~3)
    config.register("msi_data", offset + 12, 2, writable=0xFFFF)
    config.register("msi_mask", offset + 16, 4, writable=(1 << messages) - 1)
    config.register("msi_pending", offset + 20, 4)


def _add_msix(capabilities: _Capabilities, bar: Msix) -> None:
    config = capabilities.config
    offset = capabilities.add(_PCI_CAP_ID_MSIX, _PCI_CAP_MSIX_SIZEOF)
    config.register("msix_control", offset + 2, 2, bar.vectors - 1, _MSIX_WRITABLE)
    config.register("msix_table", offset + 4, 4, bar.index)
    config.register("msix_pba", offset + 8, 4, bar.pba_offset | bar.index)
