"""The binding to libvfio-user: `open_library` finds out what it can drive, `Context` is a device's life.

Only `_ffi` knows ctypes; nothing above this package does.
"""

from vfu_dev.libvfio_user.callbacks import DeviceCallbacks, ResetKind
from vfu_dev.libvfio_user.context import Context
from vfu_dev.libvfio_user.library import EXTENSION_VERSION, Library, describe, open_library
from vfu_dev.libvfio_user.regions import RegionMemory, RegionSetup

__all__ = [
    "EXTENSION_VERSION",
    "Context",
    "DeviceCallbacks",
    "Library",
    "RegionMemory",
    "RegionSetup",
    "ResetKind",
    "describe",
    "open_library",
]
