"""Completion of shipped names, asked of the program as shells ask it, and by bash itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev.cli.docs import titles
from vfu_dev.profile.shipped import shipped as profiles
from vfu_dev.series.scenario import shipped as scenarios

ROOT = Path(__file__).parents[2]
FILES = "file,"


def answer(line: str) -> list[str]:
    """Return what `vfu-dev` says to bash whose cursor is at the end of the line: `type,value` each."""
    words = line.split(" ")
    asked = {
        "_VFU_DEV_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    program = "import sys; sys.argv[0] = 'vfu-dev'; from vfu_dev.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | asked,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def plain(names: list[str]) -> list[str]:
    """Return names as they are offered."""
    return [f"plain,{name}" for name in names]


@pytest.mark.parametrize(
    "line",
    [
        "vfu-dev serve --profile ",
        "vfu-dev lab migrate --profile ",
        "vfu-dev profile show ",
        "vfu-dev profile fit ",
        "vfu-dev profile diff mlx5-300mb ",
    ],
)
def test_profiles_and_files(line: str) -> None:
    """Wherever a profile is asked for: paths are left to the shell, and the shipped names come after that."""
    assert answer(line) == [FILES, *plain(profiles())]


def test_scenarios_by_their_beginning() -> None:
    """Each of several names is completed; what is no beginning of a name may be a path."""
    kubevirt = [name for name in scenarios() if name.startswith("kube")]
    assert len(kubevirt) > 1
    assert answer("vfu-dev lab run idle kube") == [f"{FILES}kube", *plain(kubevirt)]
    assert answer("vfu-dev lab run ./no") == [f"{FILES}./no"]


def test_pages_are_no_files() -> None:
    """`docs` takes names alone."""
    assert answer("vfu-dev docs ") == plain(list(titles()))
    assert answer("vfu-dev docs faul") == plain(["faults"])
    assert answer("vfu-dev docs nothing-like-it") == [""]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("docs faul", ["faults"]),
        ("serve --profile mlx5-300", ["mlx5-300mb"]),
        ("lab run auto", ["auto-converge"]),
    ],
)
def test_bash_completes_the_word(line: str, expected: list[str], tmp_path: Path) -> None:
    """With the line of docs/install.md in its start file."""
    program = tmp_path / "vfu-dev"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m vfu_dev "$@"\n')
    program.chmod(0o755)
    (start,) = (
        row.split("`")[3] for row in (ROOT / "docs/install.md").read_text().splitlines() if ".bashrc`" in row
    )
    words = line.split(" ")
    script = f"""
        {start}
        COMP_WORDS=(vfu-dev {line}) COMP_CWORD={len(words)}
        _vfu_dev_completion vfu-dev 2>{tmp_path}/complaints
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=True,
    )
    assert done.stdout.splitlines() == expected, done.stderr
