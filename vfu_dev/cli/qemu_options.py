"""Which QEMU each host of the lab has, and how that gets the devices: `--qemu`, `--front-end`, `--iommu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from vfu_dev.attach.front_end import FRONT_ENDS, IOMMU_PATHS
from vfu_dev.builds.cache import path_meant
from vfu_dev.builds.qemu_binary import NAMES, VFIO_USER_PCI, with_paths
from vfu_dev.cli.params import for_each_side, of_side
from vfu_dev.errors import ConfigError

_Command = TypeVar("_Command", bound=Callable[..., Any])
_OPTIONS = ("qemu", "front-end", "iommu")


def qemu_options(command: _Command) -> _Command:
    """Add the options; the command gets them among its `**sides`, for `chosen_qemus`."""
    command = for_each_side(
        "iommu",
        type=click.Choice(IOMMU_PATHS),
        help="How vfio-pci reaches an IOMMU.  [default: the first of these that the QEMU has]",
    )(command)
    command = for_each_side(
        "front-end",
        type=click.Choice(FRONT_ENDS),
        help="What attaches the devices: the project's vfio-user-pci, or QEMU's own vfio-pci and a preloaded "
        "library.  [default: what the QEMU migrates with, vfio-user-pci if both]",
    )(command)
    return for_each_side(
        "qemu",
        metavar="PATH|NAME",
        help=f"A program, a folder that QEMU was built in, or one of {', '.join(NAMES)}.  [default: patched]",
    )(command)


def asked_qemus(sides: dict[str, Any]) -> dict[str, str | None]:
    """Return what the options say, as `Artifacts.find` takes it. Raises: ConfigError."""
    source, destination = (
        {name.replace("-", "_"): of_side(sides, name, side) for name in _OPTIONS}
        for side in ("source", "destination")
    )
    for one in (source, destination):
        if one["iommu"] and one["front_end"] == VFIO_USER_PCI:
            raise ConfigError(f"--iommu {one['iommu']}: is for --front-end vfio-pci")
        if one["qemu"] not in (None, *NAMES) and (path := path_meant(one["qemu"])).exists():
            one["qemu"] = str(path)  # another folder, and another machine, mean the same by it
    if source == destination:
        return source
    return source | {f"{name}_destination": value for name, value in destination.items()}


def chosen_qemus(sides: dict[str, Any]) -> dict[str, Any]:
    """Return what the options say, as fields of MigrateOptions. Raises: ConfigError, BuildError."""
    return with_paths(asked_qemus(sides))


def sent_away(sides: dict[str, Any]) -> dict[str, Any]:
    """Return what the options say of a destination elsewhere, as fields of Destination.

    They name what is there; in `sides` the destination's become those of the source.
    """
    found = {name.replace("-", "_"): of_side(sides, name, "destination") for name in _OPTIONS}
    for name in found:
        sides[f"{name}_destination"] = of_side(sides, name, "source")
    return found
