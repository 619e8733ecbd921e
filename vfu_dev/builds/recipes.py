"""All recipes, by the names of their artifacts."""

from __future__ import annotations

from vfu_dev.builds import (
    bench,
    fuzz,
    guest,
    kernels,
    libvfio_user,
    pciutils,
    qemu,
    qemu_packages,
    vfio_preload,
)
from vfu_dev.builds.recipe import Recipe

# In the order in which `--all` builds: quick ones first, QEMU's variants so that they share an object tree.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        libvfio_user.LIBRARY,
        libvfio_user.TESTS,
        libvfio_user.REDUCED,
        libvfio_user.SANITIZED,
        kernels.LIBRARY,
        kernels.SANITIZED,
        bench.CLIENT,
        bench.PEER,
        vfio_preload.LIBRARY,
        vfio_preload.ADDRESS_SANITIZED,
        vfio_preload.THREAD_SANITIZED,
        fuzz.TARGETS,
        guest.BASE,
        pciutils.PCIUTILS,
        guest.PROGRAMS,
        guest.GUEST,
        *qemu_packages.BACKPORTS,
        qemu.UNPATCHED,
        qemu.PATCHED,
        qemu.SANITIZED,
    )
}
