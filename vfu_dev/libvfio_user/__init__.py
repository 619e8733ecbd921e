"""The binding to libvfio-user: `load` finds out what it can drive, `Context` is one device's life in it.

Only `_ffi` knows ctypes; nothing above this package does.
"""

from vfu_dev.libvfio_user.context import Context, MigrationCallbacks, Region, ResetKind
from vfu_dev.libvfio_user.library import Library, describe, load

__all__ = ["Context", "Library", "MigrationCallbacks", "Region", "ResetKind", "describe", "load"]
