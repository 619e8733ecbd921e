"""The Linux guest: Debian's cloud kernel, busybox, and our own static programs in one initramfs."""

from __future__ import annotations

import lzma
import platform
import re
import shutil
from pathlib import Path

from vfu_dev.builds import apt
from vfu_dev.builds.cache import tree_digest
from vfu_dev.builds.command import BuildContext, output_of
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.guest_module import compile_module, keep_headers
from vfu_dev.builds.initramfs import Initramfs
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.pciutils import IDS_FOLDER, PCIUTILS
from vfu_dev.builds.recipe import Facts, NotBuiltError, Recipe
from vfu_dev.errors import BuildError

_VERSION = 2
_KERNEL = "linux-image-cloud-amd64"
_HEADERS = "linux-headers-cloud-amd64"
_BUSYBOX = "busybox-static"
# The files of a --sources folder that replace apt's downloads, one for each pattern. The metapackages
# are empty; the kernel's own packages have a version in their names.
_FILES = (
    "linux-image-[0-9]*.deb",
    "linux-headers-[0-9]*-cloud-amd64_*.deb",
    "linux-headers-[0-9]*-common_*.deb",
    "linux-kbuild-[0-9]*.deb",
    f"{_BUSYBOX}_*.deb",
)
_C_FLAGS = ("-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror")

# vmlinux's module section `.modinfo` holds NUL-terminated name=value strings.
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")


def _base_inputs() -> Facts:
    """Return the inputs. The kernel is the release's newest; it is kept until release or recipe change."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return {
        "recipe": _VERSION,
        "packages": [_KERNEL, _HEADERS, _BUSYBOX],
        "release": f"{release.get('ID', 'unknown')} {release.get('VERSION_ID', '')}".strip(),
    }


def _make_base(context: BuildContext, out: Path) -> Facts:
    """Unpack kernel and busybox: vmlinuz, modules/*.ko, headers/ and busybox in `out`."""
    downloads = out / "downloads"
    downloads.mkdir()
    packages = _packages(context, downloads)
    root = out / "root"
    for package in packages:
        context.run(
            ["dpkg-deb", "-x", package, root], title=f"unpack {package.name.partition('_')[0]}", cwd=out
        )
    kernels = list(root.glob("boot/vmlinuz-*"))
    busybox = [path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.is_file()]
    if len(kernels) != 1 or not busybox:
        raise BuildError(
            f"{', '.join(package.name for package in packages)}: no kernel or no busybox in them"
        )
    shutil.move(kernels[0], out / "vmlinuz")
    shutil.move(busybox[0], out / "busybox")
    modules = out / "modules"
    modules.mkdir()
    for path in root.glob("**/lib/modules/**/*.ko*"):
        shutil.move(path, modules / path.name)
    kernel = kernels[0].name.removeprefix("vmlinuz-")
    keep_headers(root, kernel, out / "headers")
    shutil.rmtree(root)
    shutil.rmtree(downloads)
    return {
        "packages": [package.name for package in packages],
        "kernel": kernel,
        "modules": len(list(modules.iterdir())),
    }


def _packages(context: BuildContext, downloads: Path) -> list[Path]:
    """Return the .deb files: from the sources folder if they are there, else downloaded by apt."""
    if context.sources is not None:
        found = [sorted(context.sources.glob(pattern)) for pattern in _FILES]
        if all(found):
            return [paths[-1] for paths in found]
    if not apt.available():
        raise BuildError(
            "the guest's kernel and busybox are Debian packages, and there is no apt here to fetch them\n"
            f"  Put these into the --sources folder: {' '.join(_FILES)}"
        )
    private = apt.PrivateApt(context.cache.root / "apt" / "machine")
    private.update(context, "fetch package lists")
    kernel = _depends(private, _KERNEL, "linux-image-")
    headers = _depends(private, _HEADERS, "linux-headers-")
    common = _depends(private, headers, "linux-headers-")
    kbuild = _depends(private, headers, "linux-kbuild-")
    private.download(context, [kernel, headers, common, kbuild, _BUSYBOX], downloads)
    return sorted(downloads.glob("*.deb"))


def _depends(private: apt.PrivateApt, package: str, prefix: str) -> str:
    """Return the first package that `package` depends on whose name starts with `prefix`."""
    for name in private.depends(package):
        if name.startswith(prefix):
            return name
    raise BuildError(f"this machine's mirrors have no {package}, or it depends on no {prefix}VERSION")


BASE = Recipe(
    name="guest-base",
    summary="the guest's kernel and busybox",
    product="",
    inputs=_base_inputs,
    make=_make_base,
    needs=("guest",),
)


def _program_folders() -> list[Path]:
    return sorted(path.parent for path in (native_dir() / "guest").glob("*/main.c"))


def _program_inputs() -> Facts:
    return {
        "recipe": _VERSION,
        "files": {folder.name: tree_digest(folder) for folder in _program_folders()},
        "shared": tree_digest(native_dir() / "guest" / "module"),  # one header says what the driver takes
        "flags": _C_FLAGS,
        "compiler": compiler_version(),
    }


def _make_programs(context: BuildContext, out: Path) -> Facts:
    """Compile each folder that has a main.c to a static program of its name."""
    for folder in _program_folders():
        context.run(
            ["cc", *_C_FLAGS, "-s", "-o", out / folder.name, *sorted(folder.glob("*.c")), "-lm"],
            title=f"guest: compile {folder.name}",
            cwd=folder,
        )
    return {"flags": _C_FLAGS, "compiler": compiler_version()}


PROGRAMS = Recipe(
    name="guest-programs",
    summary="vfud-load, for a guest of your own: static, for any Linux",
    product="",
    inputs=_program_inputs,
    make=_make_programs,
    needs=("guest-programs",),
)


def _inputs() -> Facts:
    return {
        "recipe": _VERSION,
        "files": tree_digest(native_dir() / "guest"),
        "compiler": compiler_version(),
    }


def _make(context: BuildContext, out: Path) -> Facts:
    source = native_dir() / "guest"
    base = BASE.folder(context.cache)
    shutil.copy(base / "vmlinuz", out / "vmlinuz")
    archive = Initramfs()
    for name in ("bin", "dev", "etc", "lib", "lib/modules", "mnt", "proc", "run", "sys", "tmp"):
        archive.folder(name)
    # Linux opens /dev/console for init before anything can mount a devtmpfs.
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("bin/busybox", (base / "busybox").read_bytes(), executable=True)
    made = PROGRAMS.made(context.cache)
    if made is None:
        raise NotBuiltError(PROGRAMS.name)
    programs = {folder.name: (made / folder.name).read_bytes() for folder in _program_folders()}
    tools = PCIUTILS.folder(context.cache)
    programs["lspci"] = (tools / "lspci").read_bytes()
    archive.file(f"{IDS_FOLDER}/pci.ids", (tools / "pci.ids").read_bytes())
    for applet in output_of([base / "busybox", "--list"]).split():
        if applet != "busybox" and applet not in programs:
            archive.link(f"bin/{applet}", "busybox")
    for name, data in programs.items():
        archive.file(f"bin/{name}", data, executable=True)
    modules = kernel_modules(source / "modules.txt", base / "modules")
    modules |= compile_module(context, base / "headers", source / "module", out)
    for name, data in modules.items():
        archive.file(f"lib/modules/{name}.ko", data)
    order = "".join(f"/lib/modules/{name}.ko\n" for name in modules)
    archive.file("etc/modules.order", order.encode())
    if (source / "init").is_file():
        archive.file("init", (source / "init").read_bytes(), executable=True)
    archive.write(out / "initramfs.cpio.gz")
    return {"programs": sorted(programs), "modules": list(modules), "compiler": compiler_version()}


def kernel_modules(wanted: Path, folder: Path) -> dict[str, bytes]:
    """Return the kernel modules that the file `wanted` names, one per line, and their dependencies.

    A module comes after its dependencies. Raises: BuildError: the kernel has no such module.
    """
    paths = {path.name.partition(".ko")[0].replace("-", "_"): path for path in folder.iterdir()}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in found:
            return
        if name not in paths:
            raise BuildError(f"{wanted}: the guest's kernel has no module {name}")
        data = paths[name].read_bytes()
        if paths[name].suffix == ".xz":
            data = lzma.decompress(data)
        if depends := _DEPENDS.search(data):
            for other in filter(None, depends[1].decode().split(",")):
                add(other)
        found[name] = data

    if wanted.is_file():
        for line in wanted.read_text().splitlines():
            if name := line.partition("#")[0].strip():
                add(name)
    return found


GUEST = Recipe(
    name="guest",
    summary="a Linux kernel and an initramfs with the test programs",
    product="",
    inputs=_inputs,
    make=_make,
    needs=("guest",),
    after=(BASE, PCIUTILS, PROGRAMS),
)
