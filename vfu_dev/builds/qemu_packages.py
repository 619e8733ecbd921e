"""Debian's own QEMU binaries, unmodified: unpacked into the cache with all their libraries, not installed.

The libraries, libc and dynamic loader included, are those of the binary's release. So a QEMU of a newer
Debian runs on an older one, and on other distributions. The artifact has:

    qemu-system-x86_64              the script to start; it passes all arguments to the loader
    usr/bin/qemu-system-x86_64      Debian's binary
    usr/lib/x86_64-linux-gnu/       libraries, the loader, and in qemu/ QEMU's modules
    usr/share/, usr/lib/ipxe/       firmware and option ROMs
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vfu_dev.builds import apt
from vfu_dev.builds.cache import file_digest, remove_tree
from vfu_dev.builds.command import BuildContext, CommandError, output_of
from vfu_dev.builds.elf import read_elf
from vfu_dev.builds.fetch import folder_from_environment
from vfu_dev.builds.recipe import Facts, Recipe
from vfu_dev.errors import BuildError

ENVIRONMENT = "VFU_DEV_PACKAGES"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Suite:
    """One suite of Debian that has a QEMU; `known` is its newest version that vfu-dev was tested with."""

    name: str
    release: str
    known: tuple[int, int]


# The one table of versions. If a suite has a newer version, that is used, and the build says so.
SUITES = (
    Suite("bookworm-backports", "bookworm", (10, 0)),
    Suite("trixie-backports", "trixie", (11, 1)),
)

PROGRAM = "qemu-system-x86_64"
LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
FIRMWARE = (Path("usr/share/qemu"), Path("usr/share/seabios"), Path("usr/lib/ipxe/qemu"))

_VERSION = 1
_PACKAGE = "qemu-system-x86"
# Needed packages beside libraries. qemu-system-common serves displays, sound and USB, and is left out.
_DATA = ("qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu")
_NOT_FOLLOWED = "qemu-system-common"
_LOADER = LIBRARIES / "ld-linux-x86-64.so.2"
# One file of each package without which no machine starts.
_BLOBS = ("bios-256k.bin", "linuxboot_dma.bin")

# The program's name goes through --argv0, so that its messages name what was started. --library-path is for
# this one program; what QEMU starts would inherit LD_LIBRARY_PATH. LD_PRELOAD is left alone: the loader
# honours it, and QEMU's children get it as from any QEMU. Firmware comes last, behind any -L of the
# caller's.
_SCRIPT = """\
#!/bin/sh
# {version}, started by the dynamic loader and with the libraries of its own release.
case $0 in
*/*) self=$0 ;;
*) self=./$0 ;;
esac
if [ -L "$self" ]; then self=$(readlink -f -- "$self"); fi
root=${{self%/*}}
export QEMU_MODULE_DIR="$root/{libraries}/qemu"
exec "$root/{loader}" --argv0 "$0" --library-path "$root/{libraries}" \\
    "$root/usr/bin/{program}" "$@" {firmware}
"""


def _inputs(suite: Suite) -> Facts:
    """Return the inputs: a folder's sums, or for a mirror the suite, whose current version is used."""
    folder = folder_from_environment(ENVIRONMENT)
    source: object = "mirror" if folder is None else _sums(folder, suite)
    return {"recipe": _VERSION, "suite": suite.name, "packages": source}


def _make(suite: Suite, context: BuildContext, out: Path) -> Facts:
    if platform.machine() != "x86_64":
        raise BuildError(f"Debian's QEMU for x86-64 machines does not run on {platform.machine()}")
    folder = folder_from_environment(ENVIRONMENT)
    downloads, root = out / "downloads", out / "root"
    downloads.mkdir()
    if folder is not None:
        where = str(folder / suite.release)
        packages = from_folder(folder, suite)
    else:
        where, packages = _download(context, suite, downloads)
    title = f"unpack {len(packages)} packages"
    with context.reporter.step(title) as step:
        for number, package in enumerate(packages, start=1):
            context.run(["dpkg-deb", "-x", package, root], title=title, cwd=out, step=step)
            step.update(number, len(packages))
    size = sum(package.stat().st_size for package in packages)
    keep(root, out, where)
    remove_tree(root)
    remove_tree(downloads)
    version = _start(context, suite, out)
    total = f"{len(packages)} packages, {size / 1e6:.0f} MB"
    context.reporter.say(f"{suite.name}: QEMU {version} from {where}, {total}")
    return {
        "suite": suite.name,
        "version": version,
        "from": where,
        "packages": [package.name for package in packages],
        "packages_bytes": size,
    }


def _sums(folder: Path, suite: Suite) -> dict[str, str]:
    """Return name -> sha256 of the packages of `suite`, as the folder's SHA256SUMS has them."""
    try:
        text = (folder / SUMS).read_text()
    except OSError as error:
        raise BuildError(f"{ENVIRONMENT}={folder}: no {SUMS} that can be read: {error.strerror}") from error
    lines = re.findall(rf"^([0-9a-f]{{64}}) [ *](?:\./)?{suite.release}/(\S+\.deb)$", text, re.MULTILINE)
    if not lines:
        raise BuildError(f"{folder / SUMS} names no {suite.release}/*.deb, which {suite.name} is made of")
    return {name: digest for digest, name in lines}


def from_folder(folder: Path, suite: Suite) -> list[Path]:
    """Return the packages of `suite` in `folder`, checked against the SHA256SUMS beside them.

    Raises: BuildError: a package is missing, differs, or has no sum.
    """
    sums = _sums(folder, suite)
    place = folder / suite.release
    if missing := [name for name in sums if not (place / name).is_file()]:
        raise BuildError(f"{place} lacks {', '.join(missing)}, which {folder / SUMS} names")
    if unknown := sorted(path.name for path in place.glob("*.deb") if path.name not in sums):
        raise BuildError(f"{folder / SUMS} has no sum of {suite.release}/{', '.join(unknown)}")
    for name, expected in sums.items():
        if (found := file_digest(place / name)) != expected:
            raise BuildError(f"{place / name}: sha256 {found}, expected {expected} by {folder / SUMS}")
    return [place / name for name in sorted(sums)]


def _download(context: BuildContext, suite: Suite, into: Path) -> tuple[str, list[Path]]:
    """Download from the first of this machine's mirrors that has the suite; return that mirror and files."""
    advice = f"  A folder works instead: {ENVIRONMENT}=DIR, with DIR/{suite.release}/*.deb and DIR/{SUMS}"
    if not apt.available():
        raise BuildError(f"no apt on this machine to fetch {_PACKAGE} of {suite.name} with\n{advice}")
    reasons = []
    for mirror in apt.mirrors(context):
        lists = into / "apt"
        try:
            lines = [apt.binary_line(mirror, name, "amd64") for name in (suite.release, suite.name)]
            private = apt.PrivateApt(lists, *lines, bare=True)
            private.update(context, f"fetch the package lists of {suite.name}")
            chosen = needed(private.install_set(_PACKAGE, suite.name))
            size = sum(package.download_bytes for package in chosen)
            private.download(
                context,
                [f"{package.name}={package.version}" for package in chosen],
                into,
                f"download {len(chosen)} packages of {suite.name}, {size / 1e6:.0f} MB",
            )
            return mirror, sorted(into.glob("*.deb"))
        except CommandError as error:
            reasons.append(f"{mirror}: {apt.first_error(error.tail) or 'apt-get failed'}")
        except BuildError as error:
            reasons.append(f"{mirror}: {error}")
        finally:
            remove_tree(lists)
    raise BuildError(
        f"{_PACKAGE} of {suite.name} cannot be had from this machine's mirrors:\n  "
        + "\n  ".join(reasons)
        + f"\n{advice}"
    )


def needed(packages: Iterable[apt.Package]) -> list[apt.Package]:
    """Return those of `packages`, which apt would install, that QEMU needs when it runs.

    They are the program, its data, and libraries (Debian's section `libs`). Other dependencies (adduser,
    debconf) are needed only for the installation.
    """
    there = {package.name: package for package in packages}
    found: dict[str, apt.Package] = {}
    open_ends = [_PACKAGE]
    while open_ends:
        name = open_ends.pop()
        if name in found or name not in there:
            continue
        found[name] = there[name]
        if name == _NOT_FOLLOWED:
            continue
        for choices in there[name].depends:
            chosen = next((there[choice] for choice in choices if choice in there), None)
            if chosen is not None and (chosen.section == "libs" or chosen.name in _DATA):
                open_ends.append(chosen.name)
    return [found[name] for name in sorted(found)]


def keep(root: Path, out: Path, where: str) -> None:
    """Move the artifact's files from `root`, where the packages were unpacked, to `out`.

    Raises: BuildError: a needed file is in none of the packages; names it and `where` they are.
    """
    program = root / "usr/bin" / PROGRAM
    if not program.is_file():
        raise BuildError(f"{where}: no {PROGRAM} in the packages there (it is in {_PACKAGE}_*.deb)")
    (out / "usr/bin").mkdir(parents=True)
    shutil.move(program, out / "usr/bin" / PROGRAM)
    libraries = out / LIBRARIES
    libraries.mkdir(parents=True)
    # Debian 12 still has some packages that unpack to /lib.
    for folder in (root / LIBRARIES.relative_to("usr"), root / LIBRARIES):
        for path in folder.glob("*.so*"):
            shutil.move(path, libraries / path.name)
    for folder in FIRMWARE:
        if (root / folder).is_dir():
            shutil.copytree(root / folder, out / folder, symlinks=True)
    modules = libraries / "qemu"
    modules.mkdir()
    for path in (root / LIBRARIES / "qemu").glob("*.so"):
        if not missing_libraries(path, libraries):
            shutil.move(path, modules / path.name)
    lacking = missing_libraries(out / "usr/bin" / PROGRAM, libraries)
    if lacking:
        named = ", ".join(f"{name} (needed by {by})" for name, by in sorted(lacking.items()))
        raise BuildError(f"{where}: these libraries are in none of the packages there: {named}")
    if blobs := [name for name in _BLOBS if not any((out / folder / name).is_file() for folder in FIRMWARE)]:
        raise BuildError(f"{where}: no {', '.join(blobs)} in the packages there")


def missing_libraries(program: Path, libraries: Path) -> dict[str, str]:
    """Return the shared libraries that `program` needs and `libraries` lacks: name -> file that needs it."""
    missing: dict[str, str] = {}
    seen: set[str] = set()
    open_ends = [program]
    while open_ends:
        path = open_ends.pop()
        for name in read_elf(path).needed:
            if name in seen:
                continue
            seen.add(name)
            if (libraries / name).is_file():
                open_ends.append(libraries / name)
            else:
                missing[name] = path.name
    return missing


def _start(context: BuildContext, suite: Suite, out: Path) -> str:
    """Write the script that starts the program, and start it; return its version."""
    script = out / PROGRAM
    firmware = " ".join(f'-L "$root/{folder}"' for folder in FIRMWARE if (out / folder).is_dir())
    places = {"libraries": LIBRARIES, "loader": _LOADER, "program": PROGRAM, "firmware": firmware}
    script.write_text(_SCRIPT.format(version=f"QEMU of {suite.name}", **places))
    script.chmod(0o755)
    context.run([script, "--version"], title=f"start QEMU of {suite.name}", cwd=out)
    version = output_of([script, "--version"]).partition("\n")[0].removeprefix("QEMU emulator version ")
    if (found := re.match(r"(\d+)\.(\d+)", version)) and (int(found[1]), int(found[2])) > suite.known:
        newest = ".".join(map(str, suite.known))
        context.reporter.say(
            f"{suite.name} has QEMU {version} now; vfu-dev was tested with {newest}: the newer one is used"
        )
    return version


def _recipe(suite: Suite) -> Recipe:
    newest = ".".join(map(str, suite.known))
    return Recipe(
        name=f"qemu-{suite.name}",
        summary=f"Debian's QEMU of {suite.name}, {newest} or newer, not compiled",
        product=PROGRAM,
        inputs=partial(_inputs, suite),
        make=partial(_make, suite),
        needs=("qemu-packages",),
    )


BACKPORTS = tuple(_recipe(suite) for suite in SUITES)
