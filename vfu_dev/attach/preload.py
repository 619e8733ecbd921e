"""The preloaded library's environment, and for each device a folder that stands in for sysfs.

Source: native/vfio-preload/README.md, "By hand" and "The environment".
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vfu_dev.errors import VfuDevError

MAX_DEVICES = 64
# Bytes of a socket's name: sun_path of struct sockaddr_un, without the end.
MAX_SOCKET_NAME = 107

_PREFIX = "VFU_DEV_PRELOAD_"
# Names that the kernel gives to no device and to no group.
_CDEV = "vfio-user"
_FIRST_GROUP = 1_000_000
# These variables name sockets and descriptors. If inherited, they would add devices of an earlier attach.
_NAMING = re.compile(rf"{_PREFIX}(SOCKET\d+|FD\d+|IOMMUFD)")
_NULL_DEVICE = "1:3\n"  # the numbers of /dev/null, which the library opens


class AttachError(VfuDevError):
    """A device cannot be attached this way; the text says what to do."""


@dataclass(frozen=True)
class Descriptors:
    """Numbers of the descriptors for /dev/iommu and each device, open on /dev/null when QEMU starts."""

    iommufd: int
    devices: tuple[int, ...]

    @classmethod
    def numbered(cls, numbers: Sequence[int]) -> Descriptors:
        """Take the first number for /dev/iommu, and one for each device."""
        return cls(numbers[0], tuple(numbers[1:]))

    @property
    def all(self) -> tuple[int, ...]:
        """Every number."""
        return (self.iommufd, *self.devices)


@dataclass(frozen=True)
class Preload:
    """The library, and its variables besides the sockets.

    Attributes:
        library: libvfio-preload.so.
        log: file to which calls and answers are appended.
        variables: more of the library's variables, without their prefix: `{"DMA": "message"}`.
        first: a library that has to be preloaded before any other: a sanitizer's, by the name that the loader
            looks for it. Empty for none.
    """

    library: Path
    log: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    first: str = ""

    def environment(self, sockets: Sequence[Path], descriptors: Descriptors | None = None) -> dict[str, str]:
        """Return the variables to add to the environment. The library comes last in LD_PRELOAD.

        Raises: AttachError: the loader or a socket cannot have this path, or there are too many devices.
        """
        if any(character in str(self.library) for character in " :"):
            raise AttachError(f"{self.library}: LD_PRELOAD takes no path with a space or a colon")
        if len(sockets) > MAX_DEVICES:
            raise AttachError(f"{len(sockets)} devices: the preloaded library takes {MAX_DEVICES}")
        variables = {
            "LD_PRELOAD": " ".join(
                filter(None, [self.first, os.environ.get("LD_PRELOAD"), str(self.library)])
            ),
            **{f"{_PREFIX}{name}": value for name, value in self.variables.items()},
        }
        for number, socket in enumerate(sockets):
            if len(os.fsencode(socket)) > MAX_SOCKET_NAME:
                raise AttachError(f"{socket}: a socket's path has at most {MAX_SOCKET_NAME} bytes")
            variables[f"{_PREFIX}SOCKET{number}"] = str(socket)
        if descriptors is not None:
            variables[f"{_PREFIX}IOMMUFD"] = str(descriptors.iommufd)
            for number, descriptor in enumerate(descriptors.devices):
                variables[f"{_PREFIX}FD{number}"] = str(descriptor)
        if self.log is not None:
            variables[f"{_PREFIX}LOG"] = str(self.log)
        return variables


def inherited_environment() -> dict[str, str]:
    """Return this process's environment without devices that an earlier attach put there."""
    return {name: value for name, value in os.environ.items() if not _NAMING.fullmatch(name)}


def sysfs_folder(socket: Path) -> Path:
    """Return the folder that stands in sysfs for the device on `socket`: SOCKET.vfio beside it."""
    return socket.with_name(socket.name + ".vfio")


def make_sysfs(socket: Path, number: int) -> Path:
    """Make `sysfs_folder(socket)` say that its device is `number`, and return it.

    QEMU takes the first entry of `vfio-dev` whose name begins with `vfio`, so entries of an earlier attach
    are removed.

    Raises: AttachError: it cannot be written.
    """
    folder = sysfs_folder(socket)
    try:
        shutil.rmtree(folder / "vfio-dev", ignore_errors=True)
        entry = folder / "vfio-dev" / f"{_CDEV}{number}"
        entry.mkdir(parents=True)
        (entry / "dev").write_text(_NULL_DEVICE)
        group = folder / "iommu_group"
        group.unlink(missing_ok=True)
        group.symlink_to(f"/sys/kernel/iommu_groups/{_FIRST_GROUP + number}")
    except OSError as error:
        raise AttachError(f"{folder}: {error.strerror}") from error
    return folder
