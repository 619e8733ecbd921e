"""libvfio-user from the pinned tree, with our patches and C files: the library, its variants, its tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vfu_dev.builds.cache import tree_digest
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.patch_series import read_series, series_inputs
from vfu_dev.builds.pinned import SHA256
from vfu_dev.builds.recipe import Facts, Recipe

if TYPE_CHECKING:
    from vfu_dev.builds.command import BuildContext

# Raised when this module builds something different from the same inputs.
_VERSION = 1

PRODUCT = "libvfio-user.so.0"

RELEASE = ("-Dbuildtype=release", "-Ddebug-logs=disabled")
# With debug information the subproject's own meson.build turns on -Werror and its debug logging.
_DEBUG = ("-Dbuildtype=debug",)
_SANITIZED = (*RELEASE, "-Db_sanitize=address,undefined", "-Db_lundef=false")


def _inputs(options: tuple[str, ...], defines: tuple[str, ...]) -> Facts:
    """Return all inputs of the library's artifact."""
    native = native_dir() / "libvfio-user"
    return {
        "recipe": _VERSION,
        "sources": SHA256,
        "patches": series_inputs(read_series(native)),
        "files": tree_digest(native / "src"),
        "options": options,
        "defines": defines,
        "compiler": compiler_version(),
    }


def _make_library(
    options: tuple[str, ...], defines: tuple[str, ...], strip: bool, context: BuildContext, out: Path
) -> Facts:
    from vfu_dev.builds import libvfio_user_tree  # here: who looks for the library builds nothing

    return libvfio_user_tree.make_library(options, defines, strip, context, out, out / PRODUCT)


def _run_tests(options: tuple[str, ...], defines: tuple[str, ...], context: BuildContext, out: Path) -> Facts:
    from vfu_dev.builds import libvfio_user_tree  # here: as above

    return libvfio_user_tree.run_tests(options, defines, context, out)


def _library(
    name: str,
    summary: str,
    options: tuple[str, ...],
    *,
    defines: tuple[str, ...] = (),
    strip: bool = True,
    override: str = "",
) -> Recipe:
    return Recipe(
        name=name,
        summary=summary,
        product=PRODUCT,
        inputs=partial(_inputs, options, defines),
        make=partial(_make_library, options, defines, strip),
        needs=("libvfio-user",),
        override=override,
    )


LIBRARY = _library(
    "libvfio-user",
    "the library with migration v2, PRE_COPY and our additions",
    RELEASE,
    override="VFU_DEV_LIBVFIO_USER",
)
REDUCED = _library(
    "libvfio-user-reduced",
    "the same without our additions, as upstream's migration v2",
    RELEASE,
    defines=("-DVFU_NO_MIGR_EXT",),
)
SANITIZED = _library(
    "libvfio-user-asan",
    "the same with the address and undefined behaviour sanitizers",
    _SANITIZED,
    defines=("-g", "-fno-omit-frame-pointer"),
    strip=False,
)
TESTS = Recipe(
    name="libvfio-user-tests",
    summary="the library's own tests, built with -Werror and run",
    product="testlog.txt",
    inputs=partial(_inputs, _DEBUG, ()),
    make=partial(_run_tests, _DEBUG, ()),
    needs=("libvfio-user",),
)
