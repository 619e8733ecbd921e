"""lspci for the guest: Debian's pciutils, compiled as a static program because the guest has no libraries.

The packaged lspci is linked with a dozen libraries, for compressed lists of ids, module aliases and DNS. The
source package is the machine's release's; apt checks it against the release's signature.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from vfu_dev.builds import apt
from vfu_dev.builds.command import BuildContext, CommandError
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.recipe import Facts, Recipe
from vfu_dev.errors import BuildError

_PACKAGE = "pciutils"
# Path of the list of ids in the guest.
IDS_FOLDER = "lib"
_OPTIONS = (
    "CC=cc",
    "OPT=-O2",
    "LDFLAGS=-static -s",
    "ZLIB=no",
    "DNS=no",
    "LIBKMOD=no",
    "HWDB=no",
    "SHARED=no",
    f"IDSDIR=/{IDS_FOLDER}",
)
# The list has 1.3 MB; the guest needs QEMU's devices. Class names follow the vendors, from the line "C 00".
_VENDORS = ("1b36", "1af4")


def _suite() -> str:
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    except OSError:
        return "stable"


def _inputs() -> Facts:
    return {"recipe": 1, "suite": _suite(), "options": _OPTIONS, "compiler": compiler_version()}


def _make(context: BuildContext, out: Path) -> Facts:
    """Compile: lspci and pci.ids in `out`."""
    downloads = out / "downloads"
    downloads.mkdir()
    description = _source(context, downloads)
    tree = out / "tree"
    context.run(["dpkg-source", "-x", description, tree], title=f"unpack {_PACKAGE}", cwd=downloads)
    context.run(["make", "lspci", *_OPTIONS], title=f"compile {_PACKAGE}", cwd=tree)
    shutil.move(tree / "lspci", out / "lspci")
    (out / "pci.ids").write_text(
        reduced_ids((tree / "pci.ids").read_text(encoding="utf-8")), encoding="utf-8"
    )
    version = description.stem.partition("_")[2]
    shutil.rmtree(tree)
    shutil.rmtree(downloads)
    return {"version": version, "suite": _suite(), "options": _OPTIONS}


def _source(context: BuildContext, downloads: Path) -> Path:
    """Return the source package's .dsc: from the sources folder if it is there, else downloaded by apt."""
    if context.sources is not None and (found := sorted(context.sources.glob(f"{_PACKAGE}_*.dsc"))):
        return found[-1]
    if not apt.available():
        raise BuildError(
            f"the guest's lspci is Debian's {_PACKAGE}, and there is no apt here to fetch it\n"
            f"  Put its source package ({_PACKAGE}_*.dsc and what that names) into the --sources folder."
        )
    reasons = []
    for mirror in apt.mirrors(context):
        line = apt.source_line(mirror, _suite(), verified=True)
        private = apt.PrivateApt(downloads / "apt", line)
        try:
            private.update(context, f"fetch the source list of {_suite()}")
            private.source(context, _PACKAGE, None, downloads)
        except CommandError as error:
            reasons.append(f"{mirror}: {error.tail.splitlines()[-1] if error.tail else error}")
            continue
        return next(iter(downloads.glob(f"{_PACKAGE}_*.dsc")))
    raise BuildError(f"no mirror of this machine has the source of {_PACKAGE}:\n  " + "\n  ".join(reasons))


def reduced_ids(text: str) -> str:
    """Return those parts of a pci.ids file that name classes and QEMU's devices."""
    kept, keeping = [], False
    for line in text.splitlines():
        if line and not line.startswith(("\t", "#")):
            keeping = line.startswith("C ") or line.partition(" ")[0] in _VENDORS
        if keeping and line:
            kept.append(line)
    return "\n".join(kept) + "\n"


PCIUTILS = Recipe(
    name="guest-pciutils",
    summary="the guest's lspci, static",
    product="",
    inputs=_inputs,
    make=_make,
    needs=("guest",),
)
