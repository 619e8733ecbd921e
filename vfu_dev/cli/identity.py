"""Options of `vfu-dev serve` that override a device's PCI identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vfu_dev.cli.params import SIZE, NumberType
from vfu_dev.errors import ConfigError
from vfu_dev.uapi import MAX_MSI_MESSAGES, MAX_MSIX_VECTORS, PCI_STD_NUM_BARS

if TYPE_CHECKING:
    from vfu_dev.device import Bar, Device

F = TypeVar("F", bound=Callable[..., Any])

PCI_KINDS = ("express", "conventional")


# option -> field of PciIdentity, bits, help
_IDENTITY = {
    "vendor-id": ("vendor", 16, "PCI vendor id."),
    "device-id": ("device", 16, "PCI device id."),
    "subsystem-vendor-id": ("subsystem_vendor", 16, "PCI subsystem vendor id."),
    "subsystem-id": ("subsystem", 16, "PCI subsystem id."),
    "class-code": ("class_code", 24, "PCI base class, subclass and interface."),
    "revision": ("revision", 8, "PCI revision."),
}


def identity_options(command: F) -> F:
    """Add the options; the command gets their values as keyword arguments, None for an option not given."""
    own = "the device's own"
    for index in reversed(range(PCI_STD_NUM_BARS)):
        text = f"Size of BAR{index}, a power of two; at least the device's own size."
        option = f"--bar{index}-size"
        command = click.option(option, type=SIZE, help=text, show_default=own)(command)
    command = click.option(
        "--pci",
        type=click.Choice(PCI_KINDS),
        help="An Express endpoint, which has function level reset, or a conventional function.",
        show_default=own,
    )(command)
    command = click.option(
        "--msi-vectors",
        type=NumberType(0, MAX_MSI_MESSAGES),
        help="MSI messages, rounded up to a power of two; 0 for a device without MSI.",
        show_default="those of MSI-X",
    )(command)
    command = click.option(
        "--msix-vectors",
        type=NumberType(1, MAX_MSIX_VECTORS),
        help="MSI-X interrupts.",
        show_default=own,
    )(command)
    for name, (_, bits, text) in reversed(_IDENTITY.items()):
        kind = NumberType(0, (1 << bits) - 1, base=16)
        command = click.option(f"--{name}", type=kind, metavar="NUMBER", help=text, show_default=own)(command)
    return command


def settle(chosen: dict[str, Any], device: Device, declared: dict[str, Bar]) -> dict[str, Bar]:
    """Override the PCI identity of `device` with `chosen`, the values of these options.

    Args: declared: what the device declares; nothing of it was made yet.
    Returns: the overridden identity.
    Raises: ConfigError: the device has no such part, or it cannot be that.
    """
    from vfu_dev.device import NO_BAR, Msix

    parts = {part: chosen[option.replace("-", "_")] for option, (part, _, _) in _IDENTITY.items()}
    device.identity = replace(
        device.identity, **{k: value for k, value in parts.items() if value is not None}
    )
    if chosen["pci"] is not None:
        device.express = chosen["pci"] == "express"
    if chosen["msi_vectors"] is not None:
        device.msi_vectors = chosen["msi_vectors"]
    vectors = chosen["msix_vectors"]
    if vectors is not None and not any(isinstance(bar, Msix) for bar in declared.values()):
        raise ConfigError("msix-vectors: this device has no MSI-X")
    present = sorted({bar.index for bar in declared.values() if bar.index != NO_BAR})
    sizes = {index: chosen[f"bar{index}_size"] for index in range(PCI_STD_NUM_BARS)}
    for index, size in sizes.items():
        if size is not None and index not in present:
            there = ", ".join(f"BAR{number}" for number in present)
            raise ConfigError(f"bar{index}-size: this device has no BAR{index}, but {there}")
    found = {}
    for name, bar in declared.items():
        size = sizes.get(bar.index)
        if vectors is not None and isinstance(bar, Msix):
            bar = Msix(bar.index, vectors=vectors)
        try:
            found[name] = bar if size is None else bar.with_bar(size)
        except ConfigError as err:
            raise ConfigError(f"bar{bar.index}-size: {name}: {err}") from err
    return found


def decided(device: Device) -> dict[str, Any]:
    """Return the value that each of these options has for `device`, for those that have one."""
    identity = device.identity
    values: dict[str, Any] = {
        option.replace("-", "_"): getattr(identity, part) for option, (part, _, _) in _IDENTITY.items()
    }
    values["subsystem_vendor_id"], values["subsystem_id"] = identity.subsystem_ids
    values["pci"] = PCI_KINDS[0] if device.express else PCI_KINDS[1]
    values["msix_vectors"] = device.msix_vectors or None
    values["msi_vectors"] = device.msi_messages
    return values | {f"bar{bar.index}_size": bar.bar_bytes for bar in device.bars}
