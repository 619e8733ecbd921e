"""Which libvfio-user was opened, and what it can do.

Three kinds are in circulation, with different functions and structures. What they export tells them apart:

    v1    has vfu_get_migr_register_area_size: region-based migration, retired by the kernel. Refused.
    v2    has neither that nor our addition: upstream since 2023. Driven in reduced form, with a warning.
    ours  has vfu_setup_device_migration_ext.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfu_dev.errors import LibraryError
from vfu_dev.libvfio_user import _ffi
from vfu_dev.uapi import MigrationFlags

logger = logging.getLogger(__name__)

# Of what our library has beyond upstream's; a library with another one is refused.
EXTENSION_VERSION = _ffi.VFU_MIGR_EXT_VERS

_MISSING_IN_V2 = (
    "pre-copy sizes (MIG_GET_PRECOPY_INFO)",
    "stop-copy size (MIG_DATA_SIZE)",
    "P2P states, so a VM can have only one migratable device",
    "the DMA log of memory without a file, such as firmware: DMA_LOGGING_REPORT fails, "
    "and with it a migration by QEMU; one by `vfu-dev migrate` works",
    "client requests that cross DMA by message",
    "INTx and MSI; interrupts raised just before the stop are lost",
)


@dataclass(frozen=True)
class Library:
    """A libvfio-user that was opened.

    Attributes:
        path: the shared object.
        api: "ours" or "v2".
        flags: VFIO_MIGRATION_* that a device served through it can announce.
        missing: what it lacks, in words.
        call: its functions by name; each raises LibraryError where C says -1 or NULL.
    """

    path: Path
    api: str
    flags: MigrationFlags
    missing: tuple[str, ...]
    handle: Any

    @property
    def is_ours(self) -> bool:
        """Whether the library has our additions."""
        return self.api == "ours"

    def function(self, name: str) -> Callable[..., Any]:
        """Return the C function `name`."""
        return getattr(self.handle, name)  # type: ignore[no-any-return]

    def check(self, name: str, *arguments: Any) -> int:
        """Call `name` and return its result.

        Raises: LibraryError: it returned -1, with its errno.
        """
        result = int(self.function(name)(*arguments))
        if result == -1:
            raise failed(name)
        return result


def failed(name: str) -> LibraryError:
    """Return the error for a call that reported failure through errno."""
    number = _ffi.last_errno()
    error = LibraryError(f"{name}: {os.strerror(number)}")
    error.errno = number
    return error


def open_library(path: Path | str) -> Library:
    """Open the library at `path` and find out what it is.

    Raises: LibraryError: not a library, not libvfio-user, or one that cannot be driven; the text says which.
    """
    path = Path(path)
    handle = _ffi.open_library(str(path))
    absent = [
        name for name, prototype in _ffi.PROTOTYPES.items() if not _ffi.declare(handle, name, prototype)
    ]
    if absent:
        raise LibraryError(f"{path} is not a known libvfio-user: it lacks {', '.join(absent)}")
    if _ffi.declare(handle, "vfu_get_migr_register_area_size", _ffi.MIGRATION_V1_MARK):
        raise LibraryError(
            f"{path} speaks migration v1 (it exports vfu_get_migr_register_area_size), which neither QEMU nor"
            " the kernel uses any more; run `vfu-dev build libvfio-user`, or name a library with migration v2"
        )
    if not _ffi.declare(handle, "vfu_setup_device_migration_callbacks", _ffi.SETUP_MIGRATION_V2):
        raise LibraryError(f"{path} has no migration at all (no vfu_setup_device_migration_callbacks)")
    if hasattr(handle, "vfu_setup_device_migration_ext"):
        return _open_ours(path, handle)
    return _open_v2(path, handle)


def _open_ours(path: Path, handle: Any) -> Library:
    for name, prototype in _ffi.EXT_PROTOTYPES.items():
        if not _ffi.declare(handle, name, prototype):
            raise LibraryError(f"{path} has vfu_setup_device_migration_ext but not {name}; build it again")
    version = handle.vfu_ext_api_version()
    if version != _ffi.VFU_MIGR_EXT_VERS:
        raise LibraryError(
            f"{path} has version {version} of the migration extensions, this program drives"
            f" {_ffi.VFU_MIGR_EXT_VERS}; run `vfu-dev build libvfio-user`"
        )
    _ffi.declare(handle, "vfu_setup_device_dma", _ffi.SETUP_DMA_3)
    flags = (
        MigrationFlags.VFIO_MIGRATION_STOP_COPY
        | MigrationFlags.VFIO_MIGRATION_P2P
        | MigrationFlags.VFIO_MIGRATION_PRE_COPY
    )
    return Library(path, "ours", flags, (), handle)


def _open_v2(path: Path, handle: Any) -> Library:
    if not _ffi.declare(handle, "vfu_setup_device_dma", _ffi.SETUP_DMA_ANY):
        raise LibraryError(f"{path} has no DMA (no vfu_setup_device_dma)")
    for name in ("vfu_sgl_read", "vfu_sgl_write"):
        _ffi.declare(handle, name, _ffi.SGL_COPY_ANY)
    flags = MigrationFlags.VFIO_MIGRATION_STOP_COPY | MigrationFlags.VFIO_MIGRATION_PRE_COPY
    return Library(path, "v2", flags, _MISSING_IN_V2, handle)


def describe(path: Path | str) -> dict[str, object]:
    """Say what the library at `path` is and can do, for `vfu-dev doctor`; never raises.

    Returns: path, ok, api ("ours", "v2" or None), migration_flags (names), missing (texts), error (text or
    None).
    """
    result: dict[str, object] = {
        "path": str(path),
        "ok": False,
        "api": None,
        "migration_flags": [],
        "missing": [],
        "error": None,
    }
    try:
        library = open_library(path)
    except LibraryError as err:
        return result | {"error": str(err)}
    flags = [flag.name for flag in MigrationFlags if flag in library.flags]
    return result | {
        "ok": True,
        "api": library.api,
        "migration_flags": flags,
        "missing": list(library.missing),
    }
