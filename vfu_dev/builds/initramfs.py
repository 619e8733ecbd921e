"""Writes an initramfs: a gzipped cpio archive, "newc" format, as Linux's buffer-format.rst describes it.

cpio(1) needs root for device nodes, and its times and inode numbers differ from run to run. Here the same
files give the same archive.
"""

from __future__ import annotations

import gzip
import io
import stat
from pathlib import Path

_MAGIC = b"070701"


class Initramfs:
    """An archive being written. Names are relative to /; a folder must be added before its content."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def folder(self, name: str) -> None:
        """Add the folder `name`, mode 0755."""
        self._entry(name, stat.S_IFDIR | 0o755, b"", links=2)

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """Add a regular file with `data`."""
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link to `target`."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device node, mode 0600."""
        self._entry(name, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def write(self, path: Path) -> None:
        """Finish the archive and write it, compressed, to `path`."""
        self._entry("TRAILER!!!", 0, b"")
        path.write_bytes(gzip.compress(self._out.getvalue(), compresslevel=6, mtime=0))

    def _entry(
        self, name: str, mode: int, data: bytes, *, links: int = 1, device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, major, minor, rmajor, rminor, namesize, check
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = _MAGIC + b"".join(b"%08x" % field for field in fields)
        self._out.write(_padded(header + encoded) + _padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
