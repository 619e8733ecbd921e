"""The library that gives an unmodified QEMU our device: preloaded, it answers the kernel's VFIO system calls.

native/vfio-preload/ is compiled against the kernel headers of the pinned QEMU tree, which are newer than a
distribution's. The README there describes the library and its variables.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vfu_dev.builds import fetch
from vfu_dev.builds.cache import tree_digest
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.pinned import SHA256
from vfu_dev.builds.recipe import SANITIZERS, Facts, Recipe

# Raised when this module builds something different from the same inputs.
_VERSION = 1

_PRODUCT = "libvfio-preload.so"
_C_FLAGS = (
    "-std=gnu11",
    "-O2",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    # Initial-exec TLS: a library that is loaded at the start needs no __tls_get_addr().
    "-ftls-model=initial-exec",
    # The library defines functions that the fortified headers would redefine.
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    # A structure of <linux/vfio.h> with a flexible array, passed by value: no ABI but our own depends on it.
    "-Wno-psabi",
)
_LINK_FLAGS = ("-shared", "-Wl,-z,now,-z,relro,-z,noexecstack", "-Wl,--no-undefined")


def _sources() -> list[str]:
    return sorted(name for name in tree_digest(native_dir() / "vfio-preload") if name.endswith((".c", ".h")))


def _inputs(extra: tuple[str, ...]) -> Facts:
    digest = tree_digest(native_dir() / "vfio-preload")
    return {
        "recipe": _VERSION,
        "sources": SHA256,
        "files": {name: digest[name] for name in _sources()},
        "flags": [*_C_FLAGS, *_LINK_FLAGS, *extra],
        "compiler": compiler_version(),
    }


def _make(extra: tuple[str, ...], context: BuildContext, out: Path) -> Facts:
    headers = fetch.unpacked(context) / "linux-headers"
    source = native_dir() / "vfio-preload"
    product = out / _PRODUCT
    link = [flag for flag in _LINK_FLAGS if not (extra and flag == "-Wl,--no-undefined")]
    files = [source / name for name in _sources() if name.endswith(".c")]
    context.run(
        ["cc", *_C_FLAGS, *extra, "-isystem", headers, *link, "-o", product, *files],
        title=f"{out.name.rpartition('-')[0]}: compile",
        cwd=out,
    )
    if not extra:
        context.run(["strip", "--strip-unneeded", product], title="strip", cwd=out)
    return {"flags": [*_C_FLAGS, *link, *extra], "compiler": compiler_version()}


_recipe = partial(Recipe.with_flags, product=_PRODUCT, inputs=_inputs, make=_make, needs=("vfio-preload",))
LIBRARY = _recipe(
    "vfio-preload",
    "the library that gives an unmodified QEMU the device",
    override="VFU_DEV_VFIO_PRELOAD",
)
ADDRESS_SANITIZED = _recipe(
    "vfio-preload-asan",
    "the same with the address and undefined behaviour sanitizers",
    *SANITIZERS,
)
THREAD_SANITIZED = _recipe(
    "vfio-preload-tsan",
    "the same with the thread sanitizer",
    "-fsanitize=thread",
    "-fno-omit-frame-pointer",
)
