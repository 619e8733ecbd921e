"""The two front ends: the arguments and environment that give a QEMU the devices of vfio-user servers.

front_end = make_front_end(find_qemu("bookworm-backports"))     # vfio-pci, by iommufd-cdev
front_end.objects()                         # for -object
front_end.device(0, socket)                 # for -device and device_add
front_end.environment([socket])             # and `front_end.descriptors`, open on /dev/null
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vfu_dev.attach.preload import AttachError, Descriptors, Preload, make_sysfs
from vfu_dev.builds import artifact
from vfu_dev.builds.qemu_binary import IOMMUFD_CDEV, IOMMUFD_FD, TYPE1, VFIO_PCI, VFIO_USER_PCI, QemuBinary

FRONT_ENDS = (VFIO_USER_PCI, VFIO_PCI)
IOMMU_PATHS = (IOMMUFD_CDEV, IOMMUFD_FD, TYPE1)
# The user may have an iommufd of this name with a real device behind it, which ours cannot share.
IOMMUFD_ID = "vfu-iommufd"
# First QEMU that blocks CPR where IOMMU_IOAS_CHANGE_PROCESS is not known; 10.2 ends by SIGSEGV instead.
# 11.0 was not tested.
BLOCKS_CPR = (11, 1)


class FrontEnd(ABC):
    """How one QEMU gets its devices; device i is on `sockets[i]`."""

    name: ClassVar[str]
    iommu: str | None = None

    def objects(self) -> list[dict[str, Any]]:
        """Return the objects that its devices refer to, as `-object` takes them."""
        return []

    @abstractmethod
    def device(self, number: int, socket: Path) -> dict[str, Any]:
        """Return driver and properties of device `number`, without `id` and place."""

    def environment(self, sockets: Sequence[Path]) -> dict[str, str]:
        """Return QEMU's variables; `sockets` includes spare devices. Raises: AttachError."""
        return {}

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Numbers of the descriptors that QEMU inherits, open on /dev/null."""
        return ()

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Close the descriptors that were opened for QEMU to inherit; closing twice is allowed."""


class VfioUserPci(FrontEnd):
    """vfio-user-pci, QEMU's client of the vfio-user protocol."""

    name = VFIO_USER_PCI

    def device(self, number: int, socket: Path) -> dict[str, Any]:
        """Return the device's properties, its socket among them."""
        return {"driver": self.name, "socket": {"type": "unix", "path": str(socket)}}


class VfioPci(FrontEnd):
    """QEMU's own vfio-pci. The preloaded library answers its VFIO system calls.

    Args:
        iommu: one of IOMMU_PATHS.
        descriptors: for iommufd-fd: numbers for /dev/iommu and for each device. A number serves one device
            once: QEMU closes it at unplug.
    """

    name = VFIO_PCI

    def __init__(self, iommu: str, preload: Preload, descriptors: Descriptors | None = None) -> None:
        self.iommu = iommu
        self.preload = preload
        self._numbers = descriptors if iommu == IOMMUFD_FD else None
        self._opened: list[int] = []

    @classmethod
    def inheriting(cls, iommu: str, preload: Preload, devices: int) -> VfioPci:
        """Return a front end whose descriptors are open in this process; `close` closes them."""
        opened = [os.open(os.devnull, os.O_RDWR) for _ in range(devices + 1)] if iommu == IOMMUFD_FD else []
        front_end = cls(iommu, preload, Descriptors.numbered(opened) if opened else None)
        front_end._opened = opened
        return front_end

    def objects(self) -> list[dict[str, Any]]:
        """Return the iommufd, unless the legacy container is used."""
        if self.iommu == TYPE1:
            return []
        found: dict[str, Any] = {"qom-type": "iommufd", "id": IOMMUFD_ID}
        return [found | {"fd": str(self._numbers.iommufd)} if self._numbers else found]

    def device(self, number: int, socket: Path) -> dict[str, Any]:
        """Return the device's properties, and make its folder in place of sysfs."""
        found: dict[str, Any] = {"driver": self.name}
        if self.iommu != TYPE1:
            found["iommufd"] = IOMMUFD_ID
        if self._numbers is not None:
            return found | {"fd": str(self._numbers.devices[number])}
        return found | {"sysfsdev": str(make_sysfs(socket, number))}

    def environment(self, sockets: Sequence[Path]) -> dict[str, str]:
        """Return the library's environment."""
        return self.preload.environment(sockets, self._numbers)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors of iommufd-fd; none for the other paths."""
        return self._numbers.all if self._numbers else ()

    def close(self) -> None:
        """Close this process's copies of the inherited descriptors."""
        while self._opened:
            os.close(self._opened.pop())


def choose_front_end(binary: QemuBinary, wanted: str | None = None) -> str:
    """Return `wanted`; by default the front end that migrates the device, vfio-user-pci if both do.

    Raises: QemuBinaryError: it does not attach the device in this QEMU; says what to do.
    """
    if wanted is None:
        works = [name for name in FRONT_ENDS if not binary.problem(name)]
        works.sort(key=lambda name: not binary.front_ends[name])  # stable: those that migrate come first
        wanted = works[0] if works else VFIO_PCI
    binary.require(wanted)
    return wanted


def choose_iommu(binary: QemuBinary, wanted: str | None = None) -> str:
    """Return `wanted`, or this QEMU's first of IOMMU_PATHS. Raises: AttachError: this QEMU lacks `wanted`."""
    if wanted is None:
        return next((path for path in IOMMU_PATHS if path in binary.iommu_paths), TYPE1)
    if wanted not in binary.iommu_paths:
        has = ", ".join(binary.iommu_paths) or "none"
        raise AttachError(f"{binary.path} ({binary.version}) has no {wanted}; its IOMMU paths: {has}")
    return wanted


def make_front_end(
    binary: QemuBinary,
    name: str | None = None,
    iommu: str | None = None,
    *,
    devices: int = 1,
    log: Path | None = None,
) -> FrontEnd:
    """Return the front end `name` of `binary`, for a QEMU that this process starts with `devices` at most.

    Args: name, iommu: None for the best that the QEMU has. log: the preloaded library's log file.
    Raises: QemuBinaryError, AttachError: the QEMU lacks it. BuildError: the library is not built.
    """
    name = choose_front_end(binary, name)
    if name == VFIO_USER_PCI:
        if iommu is not None:
            raise AttachError(f"vfio-user-pci has no IOMMU paths; {iommu} is for vfio-pci")
        return VfioUserPci()
    preload = preload_for(binary, Preload(artifact("vfio-preload"), log))
    return VfioPci.inheriting(choose_iommu(binary, iommu), preload, devices)


def preload_for(binary: QemuBinary, preload: Preload) -> Preload:
    """Return `preload` as this QEMU needs it. Variables that the environment sets keep their values."""
    variables = dict(preload.variables)
    if binary.release >= BLOCKS_CPR and "VFU_DEV_PRELOAD_CPR" not in os.environ:
        variables.setdefault("CPR", "refuse")
    return replace(preload, first=binary.preload_first, variables=variables)
