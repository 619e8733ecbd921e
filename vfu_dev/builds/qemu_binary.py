"""Finds a QEMU by name or path, and probes what it can do with the device.

    binary = find_qemu("trixie-backports")      # or bookworm-backports, system, patched, unpatched, a path
    binary.front_ends                           # {"vfio-user-pci": False, "vfio-pci": True}: name -> migrates
    binary.require("vfio-pci")                  # or an error that says what to do

The file's headers are read; everything else is asked of QEMU, by commands that start no machine.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vfu_dev.builds import qemu, qemu_packages
from vfu_dev.builds.cache import Cache, path_meant
from vfu_dev.builds.elf import Elf, ElfError, read_elf
from vfu_dev.builds.making import build as build_artifact
from vfu_dev.builds.packages import FIRMWARE_DIRS
from vfu_dev.builds.qemu_packages import PROGRAM
from vfu_dev.builds.recipe import Recipe
from vfu_dev.errors import BuildError

VFIO_USER_PCI = "vfio-user-pci"
VFIO_PCI = "vfio-pci"

# How a vfio-pci device reaches an IOMMU, under the names that `--iommu` has.
IOMMUFD_FD, IOMMUFD_CDEV, TYPE1 = "iommufd-fd", "iommufd-cdev", "type1"

# Older ones lose guest RAM when they migrate under TCG: 8.2.2 did in 6 of 6 moves with load.
OLDEST_FOR_PRELOAD = (10, 0)

SYSTEM = "system"
_RECIPES: dict[str, Recipe] = {
    # Ours, even if VFU_DEV_QEMU names another default.
    "patched": replace(qemu.PATCHED, override=""),
    "unpatched": qemu.UNPATCHED,
    **{
        suite.name: recipe
        for suite, recipe in zip(qemu_packages.SUITES, qemu_packages.BACKPORTS, strict=True)
    },
}
NAMES = (*_RECIPES, SYSTEM)

_PROBE_SECONDS = 20.0
_PREFIX = "QEMU emulator version "


class QemuBinaryError(BuildError):
    """A QEMU is not there, does not run, or lacks a required feature."""


@dataclass(frozen=True)
class QemuBinary:
    """One QEMU and what it can do.

    Attributes:
        path: the file to execute.
        version: as `--version` prints it: `11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)`.
        firmware: folders for -L, in order; empty when it finds firmware by itself.
        front_ends: the devices through which a vfio-user server can be attached, and whether each migrates.
        iommu_paths: how its vfio-pci can reach an IOMMU: some of iommufd-fd, iommufd-cdev, type1.
        qtest: it has `-accel qtest`, which a machine without a guest needs; Debian 12's has not.
        preload_problem: why a library cannot be preloaded into it; empty when it can.
        preload_first: a sanitizer's library, which has to be preloaded before any other; empty for none.
    """

    path: Path
    version: str
    firmware: tuple[Path, ...]
    front_ends: dict[str, bool]
    iommu_paths: tuple[str, ...]
    qtest: bool
    preload_problem: str
    preload_first: str = ""

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version; (0, 0) when the text has none."""
        return release_of(self.version)

    @property
    def migration(self) -> bool:
        """Whether its vfio-user-pci migrates the device: the project's series is in it."""
        return self.front_ends.get(VFIO_USER_PCI, False)

    def problem(self, front_end: str) -> str:
        """Return why `front_end` cannot attach the device in this QEMU, and what to do; empty if it can."""
        if front_end not in self.front_ends:
            has = ", ".join(self.front_ends) or "neither vfio-user-pci nor vfio-pci"
            since = " (QEMU has it since 10.1)" if front_end == VFIO_USER_PCI else ""
            return f"{self.path} has no {front_end}{since}; it has {has}; ours has both: vfu-dev build qemu"
        if front_end == VFIO_PCI:
            if self.release < OLDEST_FOR_PRELOAD:
                oldest = ".".join(map(str, OLDEST_FOR_PRELOAD))
                return (
                    f"{self.path} is QEMU {self.version}: vfio-pci needs {oldest} or newer here, since older "
                    "ones lose guest memory when they migrate; use bookworm-backports or trixie-backports"
                )
            if self.preload_problem:
                return (
                    f"{self.path} {self.preload_problem}, so vfio-pci cannot reach a vfio-user server from it"
                )
        return ""

    def require(self, front_end: str) -> None:
        """Raise QemuBinaryError, which says what to do, unless `front_end` can attach the device."""
        if problem := self.problem(front_end):
            raise QemuBinaryError(problem)


def find_qemu(choice: str, build: bool = False, cache: Cache | None = None) -> QemuBinary:
    """Return the QEMU of `choice`: one of NAMES, a program, or a folder that QEMU was built in.

    Args: build: build or fetch it first if it is not in the cache.
    Raises: BuildError: it is not there or does not run; says what to do.
    """
    cache = cache or Cache()
    if choice in _RECIPES:
        recipe = _RECIPES[choice]
        return probe_qemu(build_artifact(recipe, cache).path if build else recipe.find(cache))
    if choice == SYSTEM:
        if (found := shutil.which(PROGRAM)) is None:
            raise QemuBinaryError(
                f"there is no {PROGRAM} in the PATH; install your distribution's, or use trixie-backports"
            )
        return probe_qemu(Path(found))
    path = path_meant(choice)
    if not path.exists():
        names = "" if os.sep in choice else f"; as a name: {', '.join(NAMES)}"
        raise QemuBinaryError(f"{choice}: no such QEMU: neither file nor folder{names}")
    return probe_qemu(qemu.executable_in(path))


def qemu_path(choice: str | None) -> Path:
    """Return the program that `choice` means; None: ours, or what VFU_DEV_QEMU names in its place.

    Raises: BuildError: it is not there or does not run; says what to do.
    """
    return qemu.PATCHED.find(Cache()) if choice is None else find_qemu(choice).path


def with_paths(asked: Mapping[str, str | None]) -> dict[str, Any]:
    """Return `asked` with the program of each choice in place of it: of the keys that begin with `qemu`.

    Raises: BuildError: one is not there or does not run; says what to do.
    """
    return {name: qemu_path(one) if name.startswith("qemu") else one for name, one in asked.items()}


def common_machine(one: QemuBinary, other: QemuBinary) -> str:
    """Return the newest version of q35 that both QEMUs have; plain `q35` if their releases are equal.

    Raises: QemuBinaryError: there is none.
    """
    return newest_common(one, other.version, machine_versions(other.path), other.path)


def newest_common(
    one: QemuBinary, version: str, machines: Sequence[tuple[int, ...]], where: object = "the other side"
) -> str:
    """Return the same for a QEMU on another machine, by its version and the versions of its q35."""
    if one.release == release_of(version):
        return "q35"
    common = set(machine_versions(one.path)) & set(machines)
    if not common:
        raise QemuBinaryError(f"{one.path} ({one.version}) and {where} ({version}) share no q35")
    return f"pc-q35-{'.'.join(map(str, max(common)))}"


def release_of(version: str) -> tuple[int, int]:
    """Return major and minor version; (0, 0) when the text has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@lru_cache
def machine_versions(path: Path) -> tuple[tuple[int, ...], ...]:
    """Return the versions of q35 that a QEMU has."""
    found = re.findall(r"^pc-q35-([\d.]+) ", _ask(path, "-machine", "help"), re.MULTILINE)
    return tuple(tuple(map(int, version.split("."))) for version in found)


def probe_qemu(path: Path) -> QemuBinary:
    """Return the abilities of the QEMU at `path`; probed once for each state of the file.

    Raises: QemuBinaryError: it does not run.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise QemuBinaryError(f"{path}: {error.strerror}") from error
    return _probe(path, status.st_mtime_ns, status.st_size)


@lru_cache
def _probe(path: Path, mtime_ns: int, size: int) -> QemuBinary:
    first = _ask(path, "--version").partition("\n")[0]
    if not first.startswith(_PREFIX):
        raise QemuBinaryError(f"{path} is not a QEMU: its --version prints {first[:80]!r}")
    # Asking for a device's properties starts no machine and needs no firmware. The status says nothing here.
    user = _ask(path, "-device", f"{VFIO_USER_PCI},help", check=False)
    kernel = _ask(path, "-device", f"{VFIO_PCI},help", check=False)
    objects = _ask(path, "-object", "help", check=False)
    front_ends = {}
    if "socket=" in user:
        # The project's series adds the property that kernel vfio-pci has; released QEMUs lack it here.
        front_ends[VFIO_USER_PCI] = "enable-migration=" in user
    if "sysfsdev=" in kernel:
        front_ends[VFIO_PCI] = "enable-migration=" in kernel
    paths = []
    if "iommufd=" in kernel and re.search(r"^\s*iommufd$", objects, re.MULTILINE):
        if re.search(r"^\s*fd=", kernel, re.MULTILINE):
            paths.append(IOMMUFD_FD)
        paths.append(IOMMUFD_CDEV)
    if VFIO_PCI in front_ends:
        paths.append(TYPE1)
    return QemuBinary(
        path=path,
        version=first.removeprefix(_PREFIX).strip(),
        firmware=_firmware(path),
        front_ends=front_ends,
        iommu_paths=tuple(paths),
        qtest=_has_qtest(path),
        preload_problem=preload_problem(path),
        preload_first=preload_first(path),
    )


def _run(path: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [str(path), *arguments]
    try:
        return subprocess.run(command, input=stdin, capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QemuBinaryError(f"{path} does not run: {error}") from error


def _ask(path: Path, *arguments: str, check: bool = True) -> str:
    done = _run(path, *arguments)
    if check and done.returncode:
        said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise QemuBinaryError(f"{path} does not run: {said}")
    return done.stdout.decode(errors="replace")


def _has_qtest(path: Path) -> bool:
    """Return whether QEMU starts with `-accel qtest`, which `-accel help` never lists."""
    quiet = ("-nodefaults", "-no-user-config", "-display", "none", "-qtest", "null", "-qtest-log", "none")
    quit_at_once = b'{"execute":"qmp_capabilities"}{"execute":"quit"}'
    machine = ("-machine", "none", "-accel", "qtest", "-qmp", "stdio")
    return _run(path, *machine, *quiet, stdin=quit_at_once).returncode == 0


def _firmware(path: Path) -> tuple[Path, ...]:
    """Return the system's firmware folders; none if the QEMU at `path` finds its own BIOS."""
    own = _ask(path, "-L", "help", check=False).splitlines()
    if any(Path(folder, "bios-256k.bin").is_file() for folder in own if folder):
        return ()
    return tuple(folder for folder in FIRMWARE_DIRS if folder.is_dir())


def preload_problem(path: Path) -> str:
    """Return why LD_PRELOAD has no effect on the program at `path`; empty if it works.

    A script is assumed to pass it on. If the script is ours, the program that it starts is probed.
    """
    try:
        program = _program_of(path)
        return "" if program is None else _why_not(program, read_elf(program))
    except ElfError as error:
        return f"cannot be inspected ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def preload_first(path: Path) -> str:
    """Return the sanitizer's library of the program: the program ends if another library is loaded first."""
    try:
        program = _program_of(path)
        return "" if program is None else read_elf(program).sanitizer
    except (ElfError, OSError):
        return ""


def _program_of(path: Path) -> Path | None:
    """Return the program at `path`, or the one that our script there starts; None for any other script."""
    program = path.resolve()
    with program.open("rb") as file:
        if file.read(2) != b"#!":
            return program
    beside = program.parent / "usr/bin" / program.name
    return beside if beside.is_file() else None


def _why_not(program: Path, elf: Elf) -> str:
    checks: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: elf.is_static, "is linked statically, so nothing can be preloaded"),
        (lambda: elf.is_musl, "is linked with musl, and the preloaded library with glibc"),
        (
            lambda: _gains_identity(program),
            "runs setuid or setgid, where the dynamic loader ignores LD_PRELOAD",
        ),
        (
            lambda: _gains_capabilities(program),
            "has file capabilities, with which the dynamic loader ignores LD_PRELOAD (see getcap)",
        ),
    )
    return next((text for holds, text in checks if holds()), "")


def _gains_identity(program: Path) -> bool:
    status = program.stat()
    user = status.st_mode & stat.S_ISUID and status.st_uid != os.getuid()
    group = status.st_mode & stat.S_ISGID and status.st_gid != os.getgid()
    return bool(user or group)


def _gains_capabilities(program: Path) -> bool:
    if os.getuid() == 0:
        return False  # root is not affected by them
    try:
        return bool(os.getxattr(program, "security.capability"))
    except OSError:
        return False  # none, or the file system does not support them
