"""The tests for QEMU's own tree, run as docs/qemu-tests.md says, in a checkout made of the pinned source."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pagekit import ROOT, run_script
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import Cache, firmware_dirs, native_dir
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.fetch import unpacked
from vfu_dev.builds.progress import Reporter
from vfu_dev.builds.tools import meson_python

PAGE = ROOT / "docs" / "qemu-tests.md"
USER, KERNEL = "VfioUserMigration", "VfioPciMigration"
CLAIMS = {"test_cancel_in_precopy", "test_migrate_under_load", "test_refuse_another_size"}

Checkout = Callable[[Path], Path]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """Make a QEMU checkout with a build folder, as `configure` and `ninja` leave it, around a program."""

    def make(qemu: Path) -> Path:
        context = BuildContext(Cache(), Reporter(), tmp_path / "log", jobs=1)
        tree, folder = unpacked(context), tmp_path / "qemu"
        for part in ("python", "tests/functional", "scripts"):
            shutil.copytree(tree / part, folder / part, symlinks=True)
        build = folder / "build"
        # With what it was linked with, which is beside it.
        shutil.copytree(qemu.parent, build)
        firmware = build / "qemu-bundle" / "usr" / "local" / "share" / "qemu"
        firmware.mkdir(parents=True)
        files = {file.name: file for source in firmware_dirs() for file in source.iterdir() if file.is_file()}
        for file in files.values():
            (firmware / file.name).symlink_to(file)
        (build / "pyvenv").symlink_to(meson_python(context).parents[1])
        return folder

    return make


def commands() -> str:
    """Return the page's commands, which run the tests."""
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(block)


def outcomes(said: str) -> set[tuple[str, str, str]]:
    """Return (outcome, class, test) of each line of TAP."""
    lines = re.findall(r"^(ok|not ok) \d+ \w+\.(\w+)\.(\w+)(.*)$", said, re.MULTILINE)
    return {("skipped" if "SKIP" in rest else word, owner, name) for word, owner, name, rest in lines}


def run_page(qemu: Path, checkout: Checkout, tmp_path: Path) -> set[tuple[str, str, str]]:
    """Run the page's commands in a checkout around `qemu`."""
    where = {"QEMU": str(checkout(qemu)), "NATIVE": str(native_dir())}
    return outcomes(run_script(commands(), tmp_path, tmp_path, 4 * PATIENCE_SECONDS, **where))


def test_both_front_ends_of_a_qemu_with_the_series(
    qemu: Path, preload: Path, library: Path, checkout: Checkout, tmp_path: Path
) -> None:
    found = run_page(qemu, checkout, tmp_path)
    assert found == {("ok", owner, name) for owner in (USER, KERNEL) for name in CLAIMS}


@pytest.mark.soak  # by default the CI job of docs/qemu-developers.md has such a tree
def test_a_tree_without_the_series_has_vfio_pci(
    unpatched: Path, preload: Path, library: Path, checkout: Checkout, tmp_path: Path
) -> None:
    """The tests for vfio-user-pci say that it does not migrate there, and are skipped."""
    found = run_page(unpatched, checkout, tmp_path)
    expected = {(word, owner, name) for word, owner in (("skipped", USER), ("ok", KERNEL)) for name in CLAIMS}
    assert found == expected
