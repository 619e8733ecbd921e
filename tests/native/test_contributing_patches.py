"""How CONTRIBUTING.md has patches edited: its commands, run as they stand, give the series back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from pagekit import run_script
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import Cache, native_dir
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.fetch import unpacked
from vfu_dev.builds.progress import Reporter

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
QEMU_EXPORT = re.compile(r"`(git format-patch [^`]*)`")


def commands() -> str:
    """Return the block of the section."""
    section = PAGE.read_text().partition("## Edit a patch")[2]
    block = re.search(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert block, "the section has no commands"
    return block[1]


def as_exported(folder: Path) -> dict[str, str]:
    """Return the patches without their `index` lines, which git reads only where a patch does not apply."""
    return {
        path.name: re.sub(r"^index [0-9a-f.]+.*\n", "", path.read_text(), flags=re.MULTILINE)
        for path in folder.glob("*.patch")
    }


@pytest.mark.parametrize("name", ["libvfio-user", "qemu"])
def test_exporting_a_series_gives_it_back(name: str, tmp_path: Path) -> None:
    unpacked(BuildContext(Cache(), Reporter(), tmp_path / "log", jobs=1))
    script = commands().replace("~/.cache/vfu-dev", str(Cache().root))
    if name == "qemu":
        export = QEMU_EXPORT.search(PAGE.read_text())
        assert export
        script = script.replace("/subprojects/libvfio-user/.", "/.").replace(
            "native/libvfio-user", "native/qemu"
        )
        script = re.sub(r"^git format-patch .*$", export[1], script, flags=re.MULTILINE)
    series = tmp_path / "native" / name
    shutil.copytree(native_dir() / name, series)
    before = as_exported(series)
    script += '\nrm -rf "$tree"\n'
    author = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org"}
    committer = {"GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org"}
    settings = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    run_script(script, tmp_path, tmp_path, PATIENCE_SECONDS, **author, **committer, **settings)
    assert len(before) > 20
    assert as_exported(series) == before
