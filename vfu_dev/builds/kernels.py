"""The kernels: operations on pages of device memory, in C (native/kernels)."""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vfu_dev.builds.cache import tree_digest
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.recipe import SANITIZERS, Facts, Recipe

if TYPE_CHECKING:
    from vfu_dev.builds.command import BuildContext

# Raised when this module builds something different from the same inputs.
_VERSION = 1

_PRODUCT = "libvfu-kernels.so"
_C_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
_LINK_FLAGS = ("-shared", "-Wl,-z,now,-z,relro,-z,noexecstack")
# Object, source, and what the compiler needs beside the flags of all.
_OBJECTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("kernels", "kernels.c", ()),
    ("send", "send.c", ()),
    ("store", "store.c", ()),
)
if platform.machine() == "x86_64":  # two of them twice: BEST() in pages.h chooses when the code runs
    _AVX2 = ("-mavx2", "-DVFU_AVX2")
    _OBJECTS += (("kernels-avx2", "kernels.c", _AVX2), ("store-avx2", "store.c", _AVX2))


def _inputs(extra: tuple[str, ...]) -> Facts:
    return {
        "recipe": _VERSION,
        "source": tree_digest(native_dir() / "kernels"),
        "flags": [*_C_FLAGS, *_LINK_FLAGS, *extra],
        "objects": _OBJECTS,
        "compiler": compiler_version(),
    }


def _make(extra: tuple[str, ...], context: BuildContext, out: Path) -> Facts:
    title = f"{out.name.rpartition('-')[0]}: compile"
    objects = []
    for name, source, flags in _OBJECTS:
        objects.append(out / f"{name}.o")
        file = native_dir() / "kernels" / source
        context.run(["cc", *_C_FLAGS, *extra, *flags, "-c", "-o", objects[-1], file], title=title, cwd=out)
    context.run(["cc", *_LINK_FLAGS, *extra, "-o", out / _PRODUCT, *objects], title=title, cwd=out)
    for one in objects:
        one.unlink()
    return {"flags": [*_C_FLAGS, *_LINK_FLAGS, *extra], "objects": _OBJECTS, "compiler": compiler_version()}


_recipe = partial(Recipe.with_flags, product=_PRODUCT, inputs=_inputs, make=_make, needs=("vfu-kernels",))
LIBRARY = _recipe(
    "vfu-kernels",
    "what is done to pages of device memory in C",
    override="VFU_DEV_KERNELS",
)
SANITIZED = _recipe(
    "vfu-kernels-asan",
    "the same with the address and undefined behaviour sanitizers",
    "-g",
    *SANITIZERS,
)
