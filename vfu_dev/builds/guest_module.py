"""Our kernel module for the guest: compiled against the headers of exactly the guest's kernel.

Debian's header packages refer to each other by absolute paths below /usr. They are unpacked here, not
installed, so the paths of the copy are made relative.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from vfu_dev.builds.command import BuildContext
from vfu_dev.errors import BuildError

# What a module for x86 does not include.
_OTHER_FOLDERS = ("include/dt-bindings",)


def keep_headers(root: Path, kernel: str, out: Path) -> None:
    """Make `out` a folder to build modules for `kernel` against, from packages unpacked in `root`.

    Args: root: holds usr/src/linux-headers-KERNEL, its -common and usr/lib/linux-kbuild-*; they are moved.
          kernel: release, as in `uname -r`.
    Raises: BuildError: the packages are not those of this kernel, or have another layout than expected.
    """
    source = root / "usr" / "src"
    if not (source / f"linux-headers-{kernel}" / "Makefile").is_file():
        raise BuildError(f"no kernel headers for {kernel}: linux-headers-{kernel} is not among the packages")
    out.mkdir()
    shutil.move(source, out / "src")
    for kbuild in sorted((root / "usr" / "lib").glob("linux-kbuild-*")):
        (out / "lib").mkdir(exist_ok=True)
        shutil.move(kbuild, out / "lib" / kbuild.name)
    for common in (out / "src").glob("linux-headers-*-common*"):
        for architecture in (common / "arch").iterdir():
            if architecture.is_dir() and architecture.name != "x86":
                shutil.rmtree(architecture)
        for name in _OTHER_FOLDERS:
            shutil.rmtree(common / name, ignore_errors=True)
    _relative(out)
    os.symlink(f"src/linux-headers-{kernel}", out / "build")


def _relative(out: Path) -> None:
    """Turn absolute paths below /usr in links and in the makefile into relative ones."""
    for path in out.glob("**/*"):
        if path.is_symlink() and (target := os.readlink(path)).startswith("/usr/"):
            path.unlink()
            path.symlink_to(os.path.relpath(out / target.removeprefix("/usr/"), path.parent))
    for makefile in out.glob("src/linux-headers-*/Makefile"):
        text = makefile.read_text()
        makefile.write_text(re.sub(r"^include /usr/src/", "include ../", text, flags=re.MULTILINE))


def compile_module(context: BuildContext, headers: Path, source: Path, out: Path) -> dict[str, bytes]:
    """Compile the module in `source` and return name -> content of each `.ko`, without debug information.

    Args: headers: made by `keep_headers`.
          source: folder with a Kbuild file.
          out: folder to work in; its new files are removed afterwards.
    Raises: CommandError.
    """
    work = out / "module"
    shutil.copytree(source, work)
    # The headers ask for the compiler that built the kernel by its full name. Another gcc will do, as long as
    # the kernel's makefiles know its options; the kernel compares symbol versions when it loads the module.
    context.run(
        ["make", "-C", headers / "build", f"M={work}", "CC=gcc", "modules"],
        title="guest: compile the kernel module",
        cwd=work,
    )
    modules = {}
    for module in sorted(work.glob("*.ko")):
        context.run(["strip", "--strip-debug", module], title=f"guest: strip {module.name}", cwd=work)
        modules[module.stem] = module.read_bytes()
    shutil.rmtree(work)
    return modules
