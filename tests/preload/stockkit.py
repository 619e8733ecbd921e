"""Unmodified QEMUs in the lab: options for the device behind their own vfio-pci."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.qemu import RamKind


@dataclass(frozen=True)
class Stock:
    """How an unmodified QEMU is started."""

    qemu: Path
    iommu: str
    ram: RamKind = "shared"
    environment: tuple[tuple[str, str], ...] = ()


def with_stock(options: MigrateOptions, source: Stock, destination: Stock | None = None) -> MigrateOptions:
    """Return `options` with these QEMUs, which log what the library was asked."""
    chosen = replace(
        options,
        qemu=source.qemu,
        front_end="vfio-pci",
        iommu=source.iommu,
        ram=source.ram,
        qemu_environment=source.environment,
        preload_log=True,
    )
    if destination is None:
        return chosen
    return replace(
        chosen,
        qemu_destination=destination.qemu,
        front_end_destination="vfio-pci",
        iommu_destination=destination.iommu,
    )
