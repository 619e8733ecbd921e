"""Native artifacts: libvfio-user, QEMU and the guest, built from pinned sources and kept in one cache.

from vfu_dev.builds import artifact
library = artifact("libvfio-user")            # a Path, or BuildError that names the command to run
qemu = artifact("qemu", build=True)           # builds it first if it has to

What only builds is imported in functions: a server that finds its library needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from vfu_dev.builds.cache import Cache
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.recipe import NotBuiltError, Recipe, read_manifest
from vfu_dev.errors import BuildError

__all__ = [
    "DEFAULT",
    "BuildError",
    "Cache",
    "NotBuiltError",
    "Recipe",
    "artifact",
    "firmware_dirs",
    "native_dir",
    "read_manifest",
    "recipe_named",
]

# What the main job needs.
DEFAULT = ("libvfio-user", "vfu-kernels", "guest", "qemu")


# What `serve` looks for, and where: the other recipes took a tenth of its start.
_SERVED = {"libvfio-user": "vfu_dev.builds.libvfio_user", "vfu-kernels": "vfu_dev.builds.kernels"}


def recipe_named(name: str) -> Recipe:
    """Return the recipe called `name`. Raises: BuildError: there is none; lists those there are."""
    if name in _SERVED:
        return cast(Recipe, import_module(_SERVED[name]).LIBRARY)
    from vfu_dev.builds.recipes import RECIPES

    try:
        return RECIPES[name]
    except KeyError:
        raise BuildError(f"no artifact is called {name!r}; there are: {', '.join(RECIPES)}") from None


def artifact(name: str, build: bool = False) -> Path:
    """Return the path of an artifact: a library, a program, or for `guest` a folder.

    `guest` has `vmlinuz` and `initramfs.cpio.gz`. VFU_DEV_LIBVFIO_USER,
    VFU_DEV_KERNELS, VFU_DEV_QEMU and VFU_DEV_VFIO_PRELOAD name files to use instead of `libvfio-user`,
    `vfu-kernels`, `qemu` and `vfio-preload`.

    Args: build: build it now, with progress on stderr, if it is not in the cache.
    Raises: NotBuiltError (a BuildError): it is not in the cache and `build` is False; says what to run.
            BuildError: no such artifact, or it cannot be built.
    """
    chosen, cache = recipe_named(name), Cache()
    try:
        return chosen.find(cache)
    except NotBuiltError:
        if not build:
            raise
    from vfu_dev.builds import making

    return making.build(chosen, cache).path


def firmware_dirs() -> list[Path]:
    """Return the folders for QEMU's -L, those that exist, in the order to give them."""
    from vfu_dev.builds.packages import FIRMWARE_DIRS

    return [folder for folder in FIRMWARE_DIRS if folder.is_dir()]
