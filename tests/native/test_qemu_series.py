"""The series for QEMU as a maintainer receives it: `git am` takes it, checkpatch finds no error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import native_dir

SERIES = sorted((native_dir() / "qemu").glob("*.patch"))


def git(repository: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # Nobody's own settings: hooks, signing, line endings.
    env = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", repository, *arguments]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def test_git_am_takes_the_series(tree: Path, tmp_path: Path) -> None:
    """A repository of the files that the patches touch, as they are in the source package, is enough."""
    touched = {
        name
        for patch in SERIES
        for name in re.findall(r"^diff --git a/(\S+) b/", patch.read_text(), re.MULTILINE)
    }
    for name in touched:
        if (tree / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / name, tmp_path / name)
    for step in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-qm", "pinned"]):
        assert git(tmp_path, *step).returncode == 0
    taken = git(tmp_path, "am", *SERIES)
    assert taken.returncode == 0, taken.stderr
    assert git(tmp_path, "rev-list", "--count", "HEAD").stdout.strip() == str(1 + len(SERIES))


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name[:4])
def test_checkpatch_finds_no_error(tree: Path, patch: Path) -> None:
    """What QEMU's own script calls an error keeps a patch out; it also wants a sign-off."""
    command = ["scripts/checkpatch.pl", str(patch)]
    done = subprocess.run(
        command, cwd=tree, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert re.search(r"^total: 0 errors, ", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert re.search(r"^Signed-off-by: .+ <.+@.+>$", patch.read_text(), re.MULTILINE)
