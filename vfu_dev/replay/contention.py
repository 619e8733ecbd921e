"""A resource that several servers share: a lock file, held for a part of an operation's time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from vfu_dev.closing import Closing


def lock_path(resource: str) -> Path:
    """Return the lock file of a resource: one per name and user, in the folder for temporary files."""
    name = hashlib.sha256(resource.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"vfu-dev-{os.getuid()}-{name}.lock")


class SharedResource(Closing):
    """One server's end of it. Raises: OSError: the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def take(self) -> bool:
        """Take it if nobody has it; returns whether that worked."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def give(self) -> None:
        """Let others have it."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of it, and of the file, which stays: others may have it open."""
        os.close(self._fd)
