"""docs/model.md: its commands are commands, its files exist, its border is the model's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vfu_dev.cli import cli
from vfu_dev.model.link import qemu_link
from vfu_dev.model.predict import border_rate

DOCUMENTS = [Path(__file__).parents[2] / "docs" / name for name in ("model.md", "model-results.md")]
TEXT = "\n".join(page.read_text() for page in DOCUMENTS)
MIB = 1 << 20


def test_what_is_linked_exists() -> None:
    found = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(found) > 8
    for path in found:
        assert (DOCUMENTS[0].parent / path).exists(), path


@pytest.mark.parametrize("line", re.findall(r"^    (vfu-dev lab model --memory .*)$", TEXT, re.MULTILINE))
def test_the_examples_of_the_command_run(line: str) -> None:
    found = CliRunner().invoke(cli, shlex.split(line)[1:])
    assert found.exit_code == 0, found.output
    assert "converge" in found.output


def test_the_command_says_what_it_cannot_do() -> None:
    for arguments in (["--memory", "5000"], ["--map", "x.png"], ["--bandwidth", "0"]):
        found = CliRunner().invoke(cli, ["lab", "model", *arguments])
        assert isinstance(found.exception, (SystemExit, click.ClickException, ValueError))
        assert found.exit_code != 0


def test_the_border_of_the_page_is_the_models() -> None:
    """The row of the table, computed anew."""
    row = re.search(r"^\| Model \|(.*)\|$", TEXT, re.MULTILINE)
    assert row
    told = [float(cell) for cell in row[1].split("|")]
    link = [qemu_link(rate * MIB, downtime_limit_seconds=0.2) for rate in (10, 20, 30, 40, 60)]
    assert told == pytest.approx([border_rate(32 * MIB, one) / MIB for one in link], rel=0.005)
