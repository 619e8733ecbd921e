"""The window for migration data: memory shared with a server, in place of bytes in messages (native/spec/).

The client makes it. Until the reply to a request has come, the bytes that it names are the server's.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass, replace

from vfu_dev.closing import Closing

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


class DataWindow(Closing):
    """Memory for migration data; several servers may share one. It closes itself after its last user.

    Args: size_bytes: a multiple of the page size.

    Attributes:
        fd: its file descriptor, for servers.
        view: all of it. What a server can write there may change at any time: read it once, or copy it.
        size_bytes: its size.
        users: connections that have it.
    """

    def __init__(self, size_bytes: int) -> None:
        self.fd = sealed_memory(size_bytes)
        self.size_bytes = size_bytes
        self.users = 0
        self._map = mmap.mmap(self.fd, size_bytes)
        self.view = memoryview(self._map)
        self._close_fd = weakref.finalize(self, os.close, self.fd)

    def close(self) -> None:
        """Let go of the memory."""
        self._close_fd()
        self.view.release()
        with contextlib.suppress(BufferError):  # somebody still has a part of it
            self._map.close()

    def leave(self) -> None:
        """Note that a connection ended which had it."""
        self.users -= 1
        if not self.users:
            self.close()

    def place(self, offset: int, size_bytes: int) -> Place:
        """Return a part of it."""
        return Place(size_bytes, self, offset)


@dataclass(frozen=True)
class Place:
    """A buffer for migration data: of its own, or a part of a window."""

    size_bytes: int
    window: DataWindow | None = None
    offset: int = 0
    buffer: memoryview | None = None

    @classmethod
    def of(cls, buffer: memoryview) -> Place:
        """Return `buffer`, which is in no window."""
        return cls(len(buffer), buffer=buffer)

    def __len__(self) -> int:
        return self.size_bytes

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        if self.window is None:
            assert self.buffer is not None
            return self.buffer[: self.size_bytes]
        return self.window.view[self.offset : self.offset + self.size_bytes]

    def first(self, size_bytes: int) -> Place:
        """Return its first bytes."""
        return replace(self, size_bytes=min(size_bytes, self.size_bytes))
