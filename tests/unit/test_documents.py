"""What documents say about devices of one's own is run, or parsed by the command that it names."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from vfu_dev.cli import cli
from vfu_dev.cli.serve import command as serve
from vfu_dev.testing import check_device

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "authors.md"
README = ROOT / "README.md"
KVSTORE = ROOT / "docs" / "examples" / "kvstore.py"


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """Return (line number, content) of each fenced block of `language`."""
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def test_the_python_of_the_authors_guide_runs_from_top_to_bottom() -> None:
    names: dict[str, object] = {"__name__": "authors"}
    found = blocks(GUIDE, "python")
    assert len(found) >= 5
    for line, source in found:
        # Empty lines before it: a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(GUIDE), "exec"), names)
    for name in ("Counter", "Sampler"):
        check_device(names[name])  # type: ignore[arg-type]


def test_the_device_of_the_page_about_state_keeps_the_contract() -> None:
    names: dict[str, object] = {"__name__": "state_stream"}
    for _, source in blocks(ROOT / "docs" / "state-stream.md", "python"):
        exec(source, names)
    check_device(names["Queue"])  # type: ignore[arg-type]


def test_the_readme_shows_the_example_as_it_is() -> None:
    assert KVSTORE.read_text() in [source for _, source in blocks(README, "python")]


def test_the_example_is_short_and_keeps_the_contract() -> None:
    assert len(KVSTORE.read_text().splitlines()) < 60
    assert "56 lines" in GUIDE.read_text()
    assert len(KVSTORE.read_text().splitlines()) == 56
    spec = importlib.util.spec_from_file_location("kvstore", KVSTORE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_device(module.KeyValueStore)


def command_lines(path: Path) -> list[str]:
    """Return the `vfu-dev` lines of a page's shell blocks."""
    lines = [line for _, block in blocks(path, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("vfu-dev ")]


@pytest.mark.parametrize("line", command_lines(GUIDE))
def test_the_commands_of_the_guide_exist_with_their_options(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    chosen = cli.get_command(cli.make_context("vfu-dev", [name]), name)
    assert chosen is not None
    chosen.make_context(name, arguments)


def test_the_guides_configuration_file_is_one(tmp_path: Path) -> None:
    ((_, content),) = blocks(GUIDE, "toml")
    (tmp_path / "dev.toml").write_text(content)
    ctx = serve.make_context("serve", ["--config", str(tmp_path / "dev.toml")])
    assert ctx.params["metrics_port"] == tomllib.loads(content)["metrics-port"] == 9470
    assert ctx.params["vendor_id"] == 0x1234
