"""libvfio-user from the pinned tree, with our patches and C files: the library, its variants, its tests."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from vfu_dev.builds import fetch, patches, tools
from vfu_dev.builds.cache import tree_digest
from vfu_dev.builds.command import BuildContext, build_environment
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.recipe import Facts, Recipe

# Raised when this module builds something different from the same inputs.
_VERSION = 1

_SUBPROJECT = "subprojects/libvfio-user"
PRODUCT = "libvfio-user.so.0"
TARGET = "lib/libvfio-user.so.0.0.1"

RELEASE = ("-Dbuildtype=release", "-Ddebug-logs=disabled")
# With debug information the subproject's own meson.build turns on -Werror and its debug logging.
_DEBUG = ("-Dbuildtype=debug",)
_SANITIZED = (*RELEASE, "-Db_sanitize=address,undefined", "-Db_lundef=false")


def _inputs(options: tuple[str, ...], defines: tuple[str, ...]) -> Facts:
    """Return all inputs of the library's artifact."""
    native = native_dir() / "libvfio-user"
    return {
        "recipe": _VERSION,
        "sources": fetch.SHA256,
        "patches": patches.series_inputs(patches.read_series(native)),
        "files": tree_digest(native / "src"),
        "options": options,
        "defines": defines,
        "compiler": compiler_version(),
    }


def patched_source(context: BuildContext, work: Path, title: str, folder: str = "libvfio-user") -> Path:
    """Copy the sources to `work`/source, apply the changes of native/`folder`, and return that folder."""
    native = native_dir() / folder
    source = work / "source"
    shutil.copytree(fetch.unpacked(context) / _SUBPROJECT, source, symlinks=True)
    patches.apply_series(context, patches.read_series(native), source, title)
    if (native / "src").is_dir():
        shutil.copytree(native / "src", source, dirs_exist_ok=True)
    return source


def compile_tree(
    context: BuildContext,
    work: Path,
    options: tuple[str, ...],
    defines: tuple[str, ...],
    title: str,
    *targets: str,
    folder: str = "libvfio-user",
) -> Path:
    """Build `targets` of `patched_source` under `work`.

    Returns: the build folder.
    """
    tree = fetch.unpacked(context)
    python = tools.meson_python(context)
    source = patched_source(context, work, title, folder)
    # Debian 12's own <linux/vfio.h> predates VFIO_MIGRATION_PRE_COPY; the pinned tree brings a current one.
    arguments = " ".join(["-isystem", str(tree / "linux-headers"), *defines])
    environment = build_environment(python.parent)
    build = work / "build"
    meson: list[str | Path] = [python, "-m", "mesonbuild.mesonmain"]
    context.run(
        [*meson, "setup", *options, f"-Dc_args={arguments}", build, source],
        title=f"{title}: configure",
        cwd=work,
        env=environment,
    )
    context.run(
        ["ninja", f"-j{context.jobs}", "-C", build, *targets],
        title=f"{title}: compile",
        cwd=work,
        env=environment,
    )
    return build


def _make_library(
    options: tuple[str, ...], defines: tuple[str, ...], strip: bool, context: BuildContext, out: Path
) -> Facts:
    work = out / "work"
    work.mkdir()
    build = compile_tree(context, work, options, defines, out.name.rpartition("-")[0], TARGET)
    built = build / TARGET
    product = out / PRODUCT
    if strip:
        context.run(["strip", "--strip-unneeded", "-o", product, built], title="strip", cwd=out)
    else:
        shutil.copy(built, product)
    headers = out / "include"
    shutil.copytree(
        work / "source" / "include", headers, ignore=shutil.ignore_patterns("meson.build"), symlinks=True
    )
    shutil.rmtree(work)
    return {"options": options, "defines": defines, "compiler": compiler_version()}


def _run_tests(options: tuple[str, ...], defines: tuple[str, ...], context: BuildContext, out: Path) -> Facts:
    """Build with warnings as errors and run the library's own tests; the artifact is their log."""
    work = out / "work"
    work.mkdir()
    build = compile_tree(context, work, options, defines, "libvfio-user-tests")
    python = tools.meson_python(context)
    meson: list[str | Path] = [python, "-m", "mesonbuild.mesonmain"]
    context.run(
        # The other suites depend on the versions of lspci, valgrind and pytest that a machine may have.
        [*meson, "test", "-C", build, "--no-rebuild", "--suite", "unit", "--print-errorlogs"],
        title="libvfio-user-tests: run",
        cwd=work,
        env=build_environment(python.parent),
    )
    shutil.copy(build / "meson-logs" / "testlog.txt", out / "testlog.txt")
    shutil.copy(build / "meson-logs" / "testlog.json", out / "testlog.json")
    shutil.rmtree(work)
    return {"options": options, "compiler": compiler_version()}


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
