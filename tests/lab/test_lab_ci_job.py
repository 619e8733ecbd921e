"""The CI job of docs/qemu-developers.md, as a shell script; an unpatched QEMU is the tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pagekit import ROOT, run_script
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import artifact
from vfu_dev.errors import BuildError

PAGE = ROOT / "docs" / "qemu-developers.md"


def jobs() -> list[dict[str, object]]:
    """Return the page's jobs: GitHub's, then GitLab's."""
    blocks = PAGE.read_text().split("```yaml\n")[1:]
    return [yaml.safe_load(block.split("```")[0])["vfio-migration"] for block in blocks]


def commands() -> tuple[list[str], list[str]]:
    """Return the commands of GitHub's job and those of GitLab's."""
    github, gitlab = jobs()
    (step,) = github["steps"]  # type: ignore[misc, attr-defined]
    return step["run"].splitlines(), list(gitlab["script"])  # type: ignore[index, call-overload]


def test_both_jobs_run_the_same_commands() -> None:
    github, gitlab = commands()
    assert github == gitlab
    assert len(github) == 3


def test_the_job_as_a_shell_script(tmp_path: Path) -> None:
    """Each move is whole, with the QEMUs that it names and the front end of the page."""
    try:
        tree = artifact("qemu-unpatched").parent
        for name in ("libvfio-user", "vfio-preload", "guest", "qemu-bookworm-backports"):
            artifact(name)
    except BuildError as error:
        pytest.skip(str(error))
    # 3: the machine was too busy for the load, which says nothing of the migration.
    lines = [f"{line} || [ $? = 3 ]" if " lab migrate " in line else line for line in commands()[0]]
    run_script("\n".join(lines), tmp_path, tmp_path, 4 * PATIENCE_SECONDS, QEMU=str(tree))
    for name, source in (("move.json", "10.2."), ("from-stable.json", "10.0.")):
        result = json.loads((tmp_path / name).read_text())
        assert result["status"] == "completed"
        assert result["qemu"]["source"]["version"].startswith(source)
        assert result["qemu"]["destination"]["version"].startswith("10.2.")
        assert result["qemu"]["front_end"] == "vfio-pci"
        assert result["guest"]["verified"]
        assert result["guest"]["mismatched_bytes"] == 0
        (device,) = result["devices"]
        assert device["digest_match"]
        assert 0 < device["initial_bytes"] <= device["precopy_bytes"] + device["stop_copy_bytes"]
        assert device["precopy_bytes"] > 0
