"""Can somebody connect to a UNIX socket by now?"""

from __future__ import annotations

from pathlib import Path

_SOCKETS = Path("/proc/net/unix")
_ACCEPTS = 0x10000  # __SO_ACCEPTCON, include/uapi/linux/net.h


def is_listening(path: Path) -> bool:
    """Return whether a process listens on `path`, given as it was bound, without connecting to it.

    The file is there from bind() on; until listen() a client is refused, and on a busy machine that is long
    enough to be met. To connect is no way to find out: a vfio-user server has one client, and one that goes
    resets the device.

    Source:  proc(5), /proc/net/unix: Num RefCount Protocol Flags Type St Inode Path.
    """
    wanted = str(path)
    for line in _SOCKETS.read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & _ACCEPTS:
            return True
    return False
