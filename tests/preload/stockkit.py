"""Unmodified QEMUs in the lab: the device behind their own vfio-pci, by the preloaded library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vfu_dev.lab import host
from vfu_dev.vm.process import Child
from vfu_dev.vm.qemu import Qemu, QemuOptions

IommuPath = Literal["iommufd-fd", "iommufd-cdev", "type1"]

CDEV_NAME = "vfio-user"  # native/vfio-preload/README.md, "The environment"
FIRST_GROUP = 1_000_000
FIRST_FD = 20


@dataclass(frozen=True)
class Stock:
    """How an unmodified QEMU is started. `qemu` is a program or a script that execs one."""

    qemu: Path
    library: Path
    iommu: IommuPath
    shared_ram: bool = True
    ram: str = "memory-backend-memfd"
    environment: tuple[tuple[str, str], ...] = ()
    last_word: bool = False  # `environment` also replaces what the kit itself says
    machine: str = "q35"  # for moves between versions, one that both have


def make_sysfs(folder: Path, number: int) -> Path:
    """Make the folder that stands for device `number` in sysfs."""
    entry = folder / "vfio-dev" / f"{CDEV_NAME}{number}"
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "dev").write_text("1:3\n")
    group = folder / "iommu_group"
    group.unlink(missing_ok=True)
    group.symlink_to(f"/sys/kernel/iommu_groups/{FIRST_GROUP + number}")
    return folder


class StockQemu(Qemu):
    """A QEMU whose devices are `vfio-pci`."""

    stock: Stock

    def __init__(
        self, name: str, sockets: Path, logs: Path, options: QemuOptions, devices: list[Path]
    ) -> None:
        super().__init__(name, sockets, logs, options, devices)
        stock = self.stock
        self.preload_log = logs / f"{name}-preload.log"
        environment = os.environ | {
            "LD_PRELOAD": str(stock.library),
            "VFU_DEV_PRELOAD_LOG": str(self.preload_log),
        }
        environment |= dict(stock.environment)
        # The names of those that are plugged later have to be known from the start; their servers need not be there.
        later = [sockets / f"{name}-vfu{len(devices) + number}.sock" for number in range(options.spare_ports)]
        for number, socket in enumerate([*devices, *later]):
            environment[f"VFU_DEV_PRELOAD_SOCKET{number}"] = str(socket)
        if stock.last_word:
            environment |= dict(stock.environment)
        argv = self.process.argv
        if stock.iommu == "iommufd-fd":
            fds = [FIRST_FD + number for number in range(len(devices) + 1)]
            environment["VFU_DEV_PRELOAD_IOMMUFD"] = str(fds[0])
            for number, fd in enumerate(fds[1:]):
                environment[f"VFU_DEV_PRELOAD_FD{number}"] = str(fd)
            opened = " ".join(f"{fd}<>/dev/null" for fd in fds)
            argv = ["bash", "-c", f'exec {opened}; exec "$@"', "bash", *argv]
        self.process = Child(f"QEMU {name}", argv, logs / f"{name}.log", environment)

    def _command_line(self) -> list[str]:
        stock = self.stock
        argv = super()._command_line()
        at = argv.index("-machine") + 1
        argv[at] = argv[at].replace("q35", stock.machine)
        if not stock.shared_ram or stock.ram != "memory-backend-memfd":
            at = next(i for i, word in enumerate(argv) if word.startswith("memory-backend-memfd"))
            argv[at] = argv[at].replace("memory-backend-memfd", stock.ram)
            argv[at] = argv[at].replace("share=on", "share=on" if stock.shared_ram else "share=off")
        if stock.iommu != "type1":
            fd = f",fd={FIRST_FD}" if stock.iommu == "iommufd-fd" else ""
            argv += ["-object", f"iommufd,id=iommufd0{fd}"]
        return argv

    def _device(self, index: int, socket: Path) -> dict[str, Any]:
        device = super()._device(index, socket)
        del device["socket"]
        device["driver"] = "vfio-pci"
        if self.stock.iommu == "iommufd-fd":
            device["fd"] = str(FIRST_FD + 1 + index)
        else:
            device["sysfsdev"] = str(make_sysfs(Path(f"{socket}.vfio"), index))
        if self.stock.iommu != "type1":
            device["iommufd"] = "iommufd0"
        return device

    def preload(self) -> str:
        """What the library logged."""
        return self.preload_log.read_text(errors="replace")


@contextmanager
def stock_qemus(source: Stock, destination: Stock | None = None) -> Iterator[None]:
    """Have the lab start these instead of the QEMU of its options."""

    def make(name: str, sockets: Path, logs: Path, options: QemuOptions, devices: list[Path]) -> Qemu:
        chosen = destination if destination is not None and options.incoming else source
        kind = type("Chosen", (StockQemu,), {"stock": chosen})
        return kind(name, sockets, logs, replace(options, binary=chosen.qemu), devices)

    before = host.Qemu
    host.Qemu = make  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        host.Qemu = before  # type: ignore[misc]
