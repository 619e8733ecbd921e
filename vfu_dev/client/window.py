"""The window for migration data: memory shared with a server, in place of bytes in messages (native/spec/).

The client makes it. Until the reply to a request has come, the bytes that it names are the server's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass

# <linux/fcntl.h>; not in Python's fcntl before 3.12
F_ADD_SEALS = 1033
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW


def sealed_memory(size_bytes: int, seals: int = SEALS) -> int:
    """Return the file descriptor of new memory whose size cannot change; the caller closes it."""
    fd = os.memfd_create("vfu-dev-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        if seals:
            fcntl.fcntl(fd, F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


class DataWindow:
    """Memory for migration data. It lives as long as the object; several servers may share one.

    Args:    size_bytes: a multiple of the page size.

    Attributes:
        fd: its file descriptor, for servers.
        view: all of it. What a server can write there may change at any time: read it once, or copy it.
    """

    def __init__(self, size_bytes: int) -> None:
        self.fd = sealed_memory(size_bytes)
        weakref.finalize(self, os.close, self.fd)
        self.view = memoryview(mmap.mmap(self.fd, size_bytes))

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return len(self.view)

    def place(self, offset: int, size_bytes: int) -> Place:
        """Return a part of it."""
        return Place(self.view[offset : offset + size_bytes], self, offset)


@dataclass(frozen=True)
class Place:
    """A buffer for migration data, and where in which window it is, if it is in one."""

    view: memoryview
    window: DataWindow | None = None
    offset: int = 0

    def __len__(self) -> int:
        return len(self.view)

    def first(self, size_bytes: int) -> Place:
        """Return its first bytes."""
        return Place(self.view[:size_bytes], self.window, self.offset)
