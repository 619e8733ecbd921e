"""QEMU from the pinned tree: with our series, without it, and with the address sanitizer.

A whole build takes minutes, and a patch changes few files. So source and object trees stay in the cache, one
pair per set of flags. A build makes the sources equal to the pinned ones plus the series; only changed files
get new times, and ninja compiles only what depends on them.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from vfu_dev.builds import fetch, patches, tools
from vfu_dev.builds.cache import input_key, remove_tree
from vfu_dev.builds.command import BuildContext, build_environment, output_of
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.packages import FIRMWARE_DIRS
from vfu_dev.builds.patch_series import Patch, read_series, series_inputs
from vfu_dev.builds.pinned import SHA256
from vfu_dev.builds.recipe import Facts, Recipe
from vfu_dev.errors import BuildError

_VERSION = 1
_PRODUCT = "qemu-system-x86_64"
_SERVER_LIBRARY = "subprojects/libvfio-user/lib/libvfio-user.so.0"

_FLAGS = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-kvm",
    "--enable-tcg",
    "--disable-docs",
    "--disable-install-blobs",
    "--enable-trace-backends=log",
)
# What libvirt's ordinary domains ask for, and where the firmware is without -L.
_DOMAIN_FLAGS = (
    *_FLAGS,
    "--enable-slirp",
    "--enable-seccomp",
    "--enable-tpm",
    "--enable-linux-io-uring",
    "--enable-vhost-user",
    "--enable-gnutls",
    f"--firmwarepath={':'.join(map(str, FIRMWARE_DIRS))}",
)
_SANITIZED_FLAGS = (*_FLAGS, "--enable-asan")
# Upstream's own server, `-object x-vfio-user-server`: a second server to run `vfu-dev check` against.
_SERVER_FLAGS = (*_FLAGS, "--enable-multiprocess", "--enable-vfio-user-server")


def executable_in(path: Path) -> Path:
    """Return the QEMU of `path`: the file itself, or the one in a build folder or git tree.

    Raises: BuildError: the folder has none; lists the places that were searched.
    """
    if not path.is_dir():
        return path
    for folder in (path, path / "build"):
        if (folder / _PRODUCT).is_file():
            return folder / _PRODUCT
    raise BuildError(
        f"{path}: no {_PRODUCT} in it or in its build/: build it (ninja), or name another folder"
    )


def _series(patched: bool) -> list[Patch]:
    return read_series(native_dir() / "qemu") if patched else []


def _inputs(flags: tuple[str, ...], patched: bool) -> Facts:
    return {
        "recipe": _VERSION,
        "sources": SHA256,
        "flags": flags,
        "patches": series_inputs(_series(patched)),
        "compiler": compiler_version(),
    }


def _make(flags: tuple[str, ...], patched: bool, strip: bool, context: BuildContext, out: Path) -> Facts:
    name = out.name.rpartition("-")[0]
    pristine = fetch.unpacked(context)
    python = tools.meson_python(context)
    # The environment that runs meson is in: its path is written into the object tree.
    key = input_key(
        {
            "recipe": _VERSION,
            "sources": SHA256,
            "flags": flags,
            "compiler": compiler_version(),
            "python": str(python),
        }
    )
    work = context.cache.root / "work" / f"qemu-{key}"
    with context.cache.lock(work.name, context.reporter_waiting("QEMU's object tree")) as fd:
        context.fds.append(fd)
        try:
            changed = _compile(context, work, pristine, python, flags, _series(patched), name)
            built = work / "build" / _PRODUCT
            if strip:
                context.run(["strip", "-o", out / _PRODUCT, built], title=f"{name}: strip", cwd=out)
            else:
                shutil.copy(built, out / _PRODUCT)
            # Upstream's libvfio-user, where QEMU was linked with it: its run path is relative to itself.
            if (work / "build" / _SERVER_LIBRARY).exists():
                (out / _SERVER_LIBRARY).parent.mkdir(parents=True)
                shutil.copy(work / "build" / _SERVER_LIBRARY, out / _SERVER_LIBRARY)
        finally:
            context.fds.remove(fd)
    return {
        "flags": flags,
        "patched": patched,
        "version": output_of([out / _PRODUCT, "--version"]).partition("\n")[0],
        "files_changed_since_last_build": len(changed),
        "compiler": compiler_version(),
        "glib": output_of(["pkg-config", "--modversion", "glib-2.0"]).strip(),
    }


def _compile(
    context: BuildContext,
    work: Path,
    pristine: Path,
    python: Path,
    flags: tuple[str, ...],
    series: list[Patch],
    name: str,
) -> list[str]:
    """Update the trees in `work`, which the caller has locked; return the source files that changed."""
    source, build, busy = work / "source", work / "build", work / "busy"
    # This file remains only if a build was killed. Objects may then be half written, which is not detectable.
    if busy.exists():
        context.reporter.say("the last build in QEMU's object tree was killed: starting it anew")
        remove_tree(build)
        busy.unlink()
    work.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        partial_copy = work / "source.partial"
        remove_tree(partial_copy)
        patches.link_tree(pristine, partial_copy)
        partial_copy.rename(source)
    changed = patches.sync_tree(context, series, pristine, source, name)
    context.note(f"changed since the last build here: {' '.join(changed) or 'nothing'}")
    environment = build_environment()
    busy.touch()
    try:
        configured = build / ".configured"
        if not configured.exists():
            remove_tree(build)
            build.mkdir()
            context.run(
                [source / "configure", f"--python={python}", *flags],
                title=f"{name}: configure",
                cwd=build,
                env=environment,
            )
            configured.touch()
        context.run(
            ["ninja", f"-j{context.jobs}", _PRODUCT], title=f"{name}: compile", cwd=build, env=environment
        )
    finally:
        busy.unlink()
    return changed


def _recipe(
    name: str, summary: str, flags: tuple[str, ...], *, patched: bool, strip: bool = True, override: str = ""
) -> Recipe:
    return Recipe(
        name=name,
        summary=summary,
        product=_PRODUCT,
        inputs=partial(_inputs, flags, patched),
        make=partial(_make, flags, patched, strip),
        needs=("qemu", "run"),
        override=override,
        override_file=executable_in,
    )


PATCHED = _recipe(
    "qemu", "QEMU that migrates vfio-user devices", _DOMAIN_FLAGS, patched=True, override="VFU_DEV_QEMU"
)
UNPATCHED = _recipe(
    "qemu-unpatched",
    "the same QEMU without our patches, and with upstream's vfio-user server",
    _SERVER_FLAGS,
    patched=False,
)
SANITIZED = _recipe(
    "qemu-asan",
    "the patched QEMU with the address sanitizer",
    _SANITIZED_FLAGS,
    patched=True,
    strip=False,
)
