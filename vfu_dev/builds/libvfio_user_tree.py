"""Builds libvfio-user, or what is linked to it, from the pinned sources with our patches and C files."""

from __future__ import annotations

import shutil
from pathlib import Path

from vfu_dev.builds import fetch, patches, tools
from vfu_dev.builds.command import BuildContext, build_environment
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.patch_series import read_series
from vfu_dev.builds.recipe import Facts

_SUBPROJECT = "subprojects/libvfio-user"
TARGET = "lib/libvfio-user.so.0.0.1"


def patched_source(context: BuildContext, work: Path, title: str, folder: str = "libvfio-user") -> Path:
    """Copy the sources to `work`/source, apply the changes of native/`folder`, and return that folder."""
    native = native_dir() / folder
    source = work / "source"
    shutil.copytree(fetch.unpacked(context) / _SUBPROJECT, source, symlinks=True)
    patches.apply_series(context, read_series(native), source, title)
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


def make_library(
    options: tuple[str, ...],
    defines: tuple[str, ...],
    strip: bool,
    context: BuildContext,
    out: Path,
    product: Path,
) -> Facts:
    """Build the library as `product`, with its headers in `out`."""
    work = out / "work"
    work.mkdir()
    build = compile_tree(context, work, options, defines, out.name.rpartition("-")[0], TARGET)
    built = build / TARGET
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


def run_tests(options: tuple[str, ...], defines: tuple[str, ...], context: BuildContext, out: Path) -> Facts:
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
