"""The window for migration data, as the honest device behind a lying server has it (native/spec/)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct

from vfu_dev.hostile.message import RefusedError

MAX_WINDOW = 4 << 20

# <linux/fcntl.h>
_F_GET_SEALS = 1034
_NEEDED = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_READ_ONLY = 0x8 | 0x10  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE


def map_window(payload: bytes, fds: list[int]) -> memoryview:
    """Return the memory that a client hands over. Raises: RefusedError: it is not as it has to be."""
    argsz, flags, size = struct.unpack("<IIQ", payload)
    good = argsz >= 16 and not flags and len(fds) == 1 and 0 < size <= MAX_WINDOW
    if not good or size % mmap.PAGESIZE or os.fstat(fds[0]).st_size != size:
        raise RefusedError(errno.EINVAL)
    try:
        seals = fcntl.fcntl(fds[0], _F_GET_SEALS)
        if seals & _NEEDED != _NEEDED or seals & _READ_ONLY:
            raise RefusedError(errno.EINVAL)
        return memoryview(mmap.mmap(fds[0], size))
    except OSError:
        raise RefusedError(errno.EINVAL) from None


def place_of(window: memoryview, payload: bytes) -> tuple[memoryview, int]:
    """Return the bytes that a request names, and their offset. Raises: RefusedError: they are not there."""
    _, size, offset = struct.unpack("<IIQ", payload)
    if offset > len(window) or size > len(window) - offset:
        raise RefusedError(errno.EINVAL)
    return window[offset : offset + size], offset
