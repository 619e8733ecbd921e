"""What libvfio-user calls of a device, its regions apart: one page, which a server implements."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vfu_dev.libvfio_user import _ffi
from vfu_dev.uapi import DeviceState

# Addresses and lengths in bytes, shape (n, 2): what one struct iovec is, <sys/uio.h>.
Vectors = npt.NDArray[np.uint64]


class ResetKind(Enum):
    """Why the device is reset: vfu_reset_type_t."""

    DEVICE = _ffi.VFU_RESET_DEVICE
    LOST_CONNECTION = _ffi.VFU_RESET_LOST_CONN
    PCI_FLR = _ffi.VFU_RESET_PCI_FLR


class DeviceCallbacks(Protocol):
    """A device as the library sees it. Any exception becomes -1 with its errno."""

    def reset(self, kind: ResetKind) -> None:
        """Follow a reset that the client asked for, or the loss of an attached client."""

    def arc(self, target: DeviceState) -> None:
        """Go along one arc."""

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` with migration data; returns the bytes stored.

        The client may write to it meanwhile.
        """

    def gather(self, count: int) -> Vectors | None:
        """Return where the next migration data is, at most `count` bytes.

        It has to stay there until the next call of any of these. None has `read_into` called instead.
        """

    def write(self, data: memoryview) -> None:
        """Take all of `data`, which the client may change meanwhile."""

    def precopy_sizes(self) -> tuple[int, int, int]:
        """Return initial_bytes, dirty_bytes, flags."""

    def stop_copy_length(self) -> int:
        """Return the bytes to be read if the device stopped now."""

    def opt_in(self, enabled: bool) -> None:
        """Note that the client understands VFIO_PRECOPY_INFO_REINIT."""
