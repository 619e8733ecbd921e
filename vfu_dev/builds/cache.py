"""The cache of built artifacts: named by a hash of their inputs, published whole, locked between processes.

    ROOT/artifacts/NAME-KEY/   finished artifacts, each with a manifest.json; replaced whole, never changed
    ROOT/tmp/NAME-KEY/         an artifact being built; renamed into artifacts/ as its last step
    ROOT/locks/                one flock(2) file for each thing that one process at a time may make
    ROOT/logs/NAME-KEY.log     the full output of the most recent build of that artifact
    ROOT/compilers/            what each C compiler answered to `cc --version` (compiler.py)
    ROOT/work/                 QEMU's source and object trees, kept so that a changed patch rebuilds little
    ROOT/sources, ROOT/trees, ROOT/tools    the pinned source package, unpacked sources, meson

While nothing builds, deleting any part or all of it is safe: it is made again when needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vfu_dev.errors import BuildError

ENVIRONMENT = "VFU_DEV_CACHE"

# Seconds between two tries of a waiting process. A blocking flock(2) could not report that it waits.
_LOCK_POLL_SECONDS = 0.2

# Ends the name, in tmp/, of an artifact that a new one has just replaced.
_OLD = ".old"

# The name of an artifact's folder, NAME-KEY.
_ARTIFACT = re.compile(r".+-[0-9a-f]{16}")


def input_key(inputs: Mapping[str, object]) -> str:
    """Return the 16 hex digits that name an artifact made from `inputs` (JSON values, in any order)."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the sha256 of the file at `path`, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(root: Path) -> dict[str, str]:
    """Return relative path -> "sha256 mode" for every file under `root`; empty when there is no such folder.

    Hidden files, editors' backups and Python's caches are left out: builds do not use them. Of the mode only
    the executable bit counts, because version control keeps no other.
    """
    found: dict[str, str] = {}
    for folder, folders, names in os.walk(root, onerror=_not_absent):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and not name.endswith("~") and path.is_file():
                mode = "x" if os.access(path, os.X_OK) else "-"
                found[path.relative_to(root).as_posix()] = f"{file_digest(path)} {mode}"
    return found


def _not_absent(error: OSError) -> None:
    """Raise the errors that os.walk() hides, except for a folder that does not exist."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def remove_tree(path: Path, *, quietly: bool = False) -> None:
    """Remove the folder `path` and its content. It may be missing.

    Raises: OSError: it cannot be removed; with `quietly` what can be is, and nothing is raised.
    """
    # Imported here: it loads three compressors, and who finds an artifact removes nothing.
    from shutil import rmtree

    if path.exists():
        rmtree(path, ignore_errors=quietly)


def path_meant(text: str) -> Path:
    """Return the absolute path that a user means by `text`. A `~` of no home directory stays one.

    Then nothing is there, which each caller has an error for; Path.expanduser() would raise RuntimeError.
    """
    return Path(os.path.expanduser(text)).absolute()


def default_root() -> Path:
    """Return `$VFU_DEV_CACHE`, else `$XDG_CACHE_HOME/vfu-dev`, else `~/.cache/vfu-dev`; absolute.

    Raises: BuildError: it is in the home directory of a user who has none.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    # The base directory specification says to ignore a relative XDG_CACHE_HOME.
    folder = os.path.join(base, "vfu-dev") if base and os.path.isabs(base) else "~/.cache/vfu-dev"
    chosen = os.environ.get(ENVIRONMENT) or folder
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError as error:
        raise BuildError(
            f"{chosen}: there is no such home directory; name a folder for what is built in {ENVIRONMENT}"
        ) from error


class Cache:
    """One cache folder. Reading creates nothing; builds create the folders."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever built into it, as where a wheel brings all that is used."""
        return not (self.root / "artifacts").is_dir()

    def artifact_dir(self, name: str, key: str) -> Path:
        """Return the folder of artifact `name` with `key`, which exists once it is published."""
        return self.root / "artifacts" / f"{name}-{key}"

    def log_path(self, name: str, key: str) -> Path:
        """Return the log of the build of `name` with `key`; its folder exists afterwards."""
        path = self.root / "logs" / f"{name}-{key}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def lock(self, name: str, waiting: Callable[[int | None], None] | None = None) -> Iterator[int]:
        """Hold the lock `name` across processes; yields its file descriptor.

        Commands that run under the lock inherit the descriptor. The lock then lasts until the last of them
        ends, so a compiler that outlives a killed build cannot disturb the next build.

        Args: waiting: called repeatedly, with the holder's process id if known, while another process holds
              it.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if waiting is not None:
                        waiting(_holder(fd))
                    time.sleep(_LOCK_POLL_SECONDS)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def building(self, name: str, key: str) -> Iterator[Path]:
        """Yield an empty folder to build into; publish it whole if the block ends without an exception.

        The caller holds the lock `NAME-KEY`. Files of an earlier, killed build are removed first. After an
        exception the folder is removed. An existing artifact is replaced.
        """
        temporary = self.root / "tmp" / f"{name}-{key}"
        remove_tree(temporary)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            final = self.artifact_dir(name, key)
            final.parent.mkdir(parents=True, exist_ok=True)
            old = temporary.with_name(f"{temporary.name}{_OLD}")
            if final.exists():
                final.rename(old)
            temporary.rename(final)
            remove_tree(old, quietly=True)
        except BaseException:
            remove_tree(temporary, quietly=True)
            raise

    def sweep(self) -> None:
        """Remove the folders in tmp/ that killed builds left: those whose lock is free."""
        for leftover in (self.root / "tmp").glob("*"):
            with self._lock_if_free(leftover.name.removesuffix(_OLD)) as held:
                if held:  # else it is being built right now, or is not one of ours
                    remove_tree(leftover, quietly=True)

    @contextmanager
    def _lock_if_free(self, name: str, create: bool = False) -> Iterator[bool | None]:
        """Hold the lock `name` if nobody does; yields whether it is held, None if there is no such file."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            fd = os.open(self.root / "locks" / f"{name}.lock", flags, 0o666)
        except FileNotFoundError:
            yield None
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                held = False
            yield held
        finally:
            os.close(fd)

    def artifacts(self) -> list[Path]:
        """Return the folders of all artifacts, by name; what has no such name is not ours."""
        return sorted(path for path in (self.root / "artifacts").glob("*") if _ARTIFACT.fullmatch(path.name))

    def is_locked(self, folder: Path) -> bool:
        """Return whether a process builds or replaces the artifact in `folder` now."""
        with self._lock_if_free(folder.name) as held:
            return held is False

    def remove(self, folder: Path) -> bool:
        """Remove the artifact in `folder` whole; return False, with nothing done, if it is locked.

        Raises: OSError: it cannot be removed.
        """
        old = self.root / "tmp" / f"{folder.name}{_OLD}"
        for needed in (self.root / "locks", old.parent):
            needed.mkdir(parents=True, exist_ok=True)
        with self._lock_if_free(folder.name, create=True) as held:
            if not held:
                return False
            remove_tree(old)
            folder.rename(old)
            remove_tree(old)
            return True

    def sizes(self) -> dict[str, int]:
        """Return the bytes on disk of each folder of the cache; a file with several links counts once."""
        result: dict[str, int] = {}
        seen: set[tuple[int, int]] = set()
        for top in sorted(self.root.glob("*")):
            result[top.name] = disk_bytes(top, seen)
        return result


def disk_bytes(top: Path, seen: set[tuple[int, int]]) -> int:
    """Return the bytes on disk of the files below `top` not yet in `seen`, (device, inode); adds them."""
    total = 0
    for folder, _, names in os.walk(top):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                continue  # a build removed it meanwhile
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total


def _holder(fd: int) -> int | None:
    """Return the process id in the lock file; None if the lock's holder has not written it yet."""
    text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdigit() else None
