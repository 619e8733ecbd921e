"""How much memory the control groups of this process leave it: the limits of a container, a pod, a unit.

A process that exceeds them is killed, whatever /proc/meminfo says: that is the host's.

Source:  the kernel's Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.high, memory.current) and
         cgroup-v1/memory.rst (memory.limit_in_bytes, memory.usage_in_bytes); cgroups(7); proc(5), mountinfo.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """What a version of the interface calls its files, and the line of memory.stat of what can be dropped."""

    limits: tuple[str, ...]
    usage: str
    droppable: str


# Beyond memory.high nobody is killed, but made to wait, which no figure survives.
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def memory_left_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """Return what this process may still allocate until the first of its groups is full; None: no limit.

    A group's parents limit it too. What the groups hold of files that nobody uses counts as free.
    """
    left = [room for folder, files in _groups(proc) if (room := _room(folder, files)) is not None]
    return min(left, default=None)


def _groups(proc: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the folders of this process's memory groups, each with its parents as far as they are mounted."""
    mounts = list(_mounts(proc))
    for line in _lines(proc / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        for version, root, point in mounts:
            if version is files:
                # The root of the mount is the container's own group, if the path is the host's. A path from
                # outside of the namespace (`/../..`) is not below it.
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                folder = point if ".." in inside.parts else point / inside
                yield from ((one, files) for one in (folder, *folder.parents) if one.is_relative_to(point))


def _mounts(proc: Path) -> Iterator[tuple[_Files, str, Path]]:
    """Yield mounts of memory groups: the version, what of the hierarchy is mounted, and where."""
    for line in _lines(proc / "mountinfo"):
        mount, _, kind = line.partition(" - ")
        _, _, _, root, point, *_ = mount.split()
        name, _, options = kind.split(" ", 2)  # the source may be empty
        if name == "cgroup2":
            yield _VERSION_2, root, Path(point)
        elif name == "cgroup" and "memory" in options.split(","):
            yield _VERSION_1, root, Path(point)


def _room(folder: Path, files: _Files) -> int | None:
    """Return what one group leaves; None: it has no limit. Version 1 has 2^63 less a page for that."""
    limits = [int(word) for name in files.limits for word in _lines(folder / name) if word != "max"]
    used = _lines(folder / files.usage)
    if not limits or not used:
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
    return max(0, min(limits) - int(used[0]) + int(stat.get(files.droppable, 0)))


def _lines(path: Path) -> list[str]:
    """Return a file's lines; none if it is not there, as limits are not in the root of the hierarchy."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
