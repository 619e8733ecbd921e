"""What the builds and the lab need from the operating system: probes, and installation on Debian.

A probe looks for the file or program itself, not for a package, so it works on other distributions, too.
"""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.builds.command import BuildContext, CommandError, build_environment, output_of
from vfu_dev.errors import BuildError

# Where Debian puts firmware; QEMU is built without blobs and told with -L.
FIRMWARE_DIRS = (Path("/usr/share/seabios"), Path("/usr/share/qemu"))

_LOCK_SECONDS = 300


class MissingPackagesError(BuildError):
    """A build needs packages that are not installed. `packages` are their Debian names."""

    def __init__(self, packages: list[str], why: str) -> None:
        self.packages = packages
        super().__init__(f"not installed: {', '.join(packages)} ({why})\n  run: {install_command(packages)}")


@dataclass(frozen=True)
class Need:
    """One need, under the name of the Debian package that provides it.

    Each probe that is given must succeed; of `files` one must exist.
    """

    package: str
    program: str = ""  # found in PATH
    module: str = ""  # known to pkg-config
    files: tuple[str, ...] = ()  # glob patterns

    def present(self) -> bool:
        """Return whether it is present; takes less than 10 ms."""
        if self.program and shutil.which(self.program) is None:
            return False
        if self.module and not output_of(["pkg-config", "--modversion", self.module]):
            return False
        return not self.files or any(glob.glob(pattern) for pattern in self.files)


_C = (
    Need("gcc", program="cc"),
    Need("libc6-dev", files=("/usr/include/stdio.h",)),
)
_COMPILER = (
    *_C,
    Need("pkg-config", program="pkg-config"),
    Need("ninja-build", program="ninja"),
    Need("patch", program="patch"),
    Need("dpkg-dev", program="dpkg-source"),
)
GROUPS: dict[str, tuple[Need, ...]] = {
    "libvfio-user": (
        *_COMPILER,
        Need("libjson-c-dev", module="json-c"),
        Need("libcmocka-dev", module="cmocka"),
    ),
    "c": _C,
    "vfu-kernels": (*_C, Need("libxxhash-dev", files=("/usr/include/xxhash.h",))),
    "vfio-preload": (
        *_C,
        Need("binutils", program="strip"),
        Need("dpkg-dev", program="dpkg-source"),
    ),
    "fuzz": (
        Need("clang", program="clang"),
        # Named after clang's version in Debian 12; elsewhere it is part of clang, or libclang-rt-NN-dev.
        Need(
            "libclang-rt-14-dev",
            files=(
                "/usr/lib/llvm-*/lib/clang/*/lib/*/libclang_rt.fuzzer*.a",
                "/usr/lib*/clang/*/lib/*/libclang_rt.fuzzer*.a",
            ),
        ),
    ),
    "qemu": (
        *_COMPILER,
        Need("make", program="make"),
        Need("flex", program="flex"),
        Need("bison", program="bison"),
        Need("libglib2.0-dev", module="glib-2.0"),
        Need("libpixman-1-dev", module="pixman-1"),
        Need("libfdt-dev", files=("/usr/include/libfdt.h",)),
        Need("libslirp-dev", module="slirp"),
        Need("libseccomp-dev", module="libseccomp"),
        Need("liburing-dev", module="liburing"),
        Need("libgnutls28-dev", module="gnutls"),
    ),
    "guest-programs": (
        Need("gcc", program="cc"),
        Need("libc6-dev", files=("/usr/lib*/libc.a", "/usr/lib*/*/libc.a")),
    ),
    "guest": (
        Need("gcc", program="cc"),
        Need("libc6-dev", files=("/usr/lib*/libc.a", "/usr/lib*/*/libc.a")),
        Need("dpkg", program="dpkg-deb"),
        Need("dpkg-dev", program="dpkg-source"),
        # The kernel module: kbuild, and its objtool.
        Need("make", program="make"),
        Need("binutils", program="strip"),
        Need("libelf1", files=("/usr/lib*/libelf.so.1", "/usr/lib*/*/libelf.so.1")),
    ),
    "qemu-packages": (Need("dpkg", program="dpkg-deb"),),
    "run": (
        Need("seabios", files=tuple(f"{folder}/bios-256k.bin" for folder in FIRMWARE_DIRS)),
        Need("qemu-system-data", files=tuple(f"{folder}/linuxboot_dma.bin" for folder in FIRMWARE_DIRS)),
    ),
}


def missing(groups: Iterable[str]) -> list[str]:
    """Return the Debian packages that `groups` need and that are missing, each once."""
    needs = dict.fromkeys(need for group in groups for need in GROUPS[group])
    return [need.package for need in needs if not need.present()]


def install_command(packages: Iterable[str]) -> str:
    """Return the command that installs `packages`."""
    return f"sudo apt-get install -y --no-install-recommends {' '.join(packages)}"


def require(context: BuildContext, groups: Iterable[str], why: str) -> None:
    """Make sure that everything in `groups` is present; as root on Debian, install the missing packages.

    Raises: MissingPackagesError: a package is missing and cannot be installed here; has the command to run.
            CommandError: apt could not install it.
    """
    groups = list(groups)
    packages = missing(groups)
    if not packages:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise MissingPackagesError(packages, why)
    # One build at a time uses apt; a second one then finds everything installed.
    with context.cache.lock("apt-install", context.reporter_waiting("apt")):
        packages = missing(groups)
        if packages:
            context.reporter.say(f"installing for {why}: {' '.join(packages)}")
            install(context, packages)
    if still := missing(groups):
        raise MissingPackagesError(still, f"{why}; apt installed them, yet they are not found")


def install(context: BuildContext, packages: list[str]) -> None:
    """Install `packages` with apt, as root.

    New package lists are fetched only if installing with the present ones fails.
    """
    environment = build_environment() | {"DEBIAN_FRONTEND": "noninteractive"}
    command = [
        "apt-get",
        "install",
        "-y",
        "--no-install-recommends",
        f"-oDPkg::Lock::Timeout={_LOCK_SECONDS}",
        *packages,
    ]
    try:
        context.run(command, title="apt-get install", cwd=Path("/"), env=environment)
        return
    except CommandError as error:
        context.note(f"first attempt failed, lists may be old or absent: {error.returncode}")
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            context.run(["apt-get", "update"], title="apt-get update", cwd=Path("/"), env=environment)
            break
        except CommandError as error:
            # DPkg::Lock::Timeout does not cover the lock on the lists, which unattended upgrades take at
            # boot.
            if "lock" not in error.tail or time.monotonic() > deadline:
                raise
            time.sleep(2.0)
    context.run(command, title="apt-get install", cwd=Path("/"), env=environment)
