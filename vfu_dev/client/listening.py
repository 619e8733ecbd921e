"""UNIX sockets of servers that this process starts: a folder for them, and whether a server listens yet."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from vfu_dev.errors import ConfigError
from vfu_dev.uapi import UNIX_PATH_MAX

_ACCEPTS = 0x10000  # __SO_ACCEPTCON, include/uapi/linux/net.h


# What the longest of our sockets' names needs in a folder: `destination12-vfu15.sock.ctl`.
_NAME_BYTES = 40

# A file in each folder, locked (flock) by the process that made it. The kernel releases the lock when that
# process ends, however it ends.
_LOCK = "owner.lock"
_locks: dict[Path, int] = {}


def socket_folder(prefix: str) -> Path:
    """Make a folder of our own for sockets, below TMPDIR; `remove_socket_folder` removes it.

    The folders with this prefix whose owners were killed are removed first.

    Raises: ConfigError: its name leaves no room for theirs; the text says what to do.
    """
    _remove_abandoned(Path(tempfile.gettempdir()), prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        room = UNIX_PATH_MAX - 1 - len(os.fsencode(folder)) - 1
        if room < _NAME_BYTES:
            folder.rmdir()
            raise ConfigError(
                f"TMPDIR={folder.parent}: too long for UNIX sockets, whose names end at {UNIX_PATH_MAX - 1} "
                "bytes; set TMPDIR to a shorter folder"
            )
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _take(lock) and os.fstat(lock).st_nlink:
            _locks[folder] = lock
            return folder
        os.close(lock)  # another process took the file, not locked yet, for one of a dead owner


def remove_socket_folder(folder: Path) -> None:
    """Remove a folder that `socket_folder` made, with all in it."""
    shutil.rmtree(folder, ignore_errors=True)
    if (lock := _locks.pop(folder, None)) is not None:
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        try:
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # it has none, or has gone meanwhile
            continue
        try:
            if _take(lock):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_listening(path: Path, pid: int | None = None) -> bool:
    """Return whether a process listens on `path`, given as it was bound, without connecting to it.

    Each network namespace has its own list: `pid` selects the namespace of a process, by default this one.

    The file is there from bind() on; until listen() a client is refused, and on a busy machine that
    happens. A trial connection is not possible: a vfio-user server has one client, and a client that
    disconnects resets the device.

    Source:  proc(5), /proc/net/unix: Num RefCount Protocol Flags Type St Inode Path.
    """
    wanted = str(path)
    try:
        table = Path(f"/proc/{pid or 'self'}/net/unix").read_text(errors="surrogateescape")
    except OSError:  # it has ended
        return False
    for line in table.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & _ACCEPTS:
            return True
    return False
