"""What documents say about devices of one's own is run, or parsed by the command that it names."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vfu_dev.cli import cli, configfile
from vfu_dev.cli.manual import manuals
from vfu_dev.cli.serve import command as serve
from vfu_dev.testing import check_device

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "authors.md"
REFERENCE = ROOT / "docs" / "authors-reference.md"
README = ROOT / "README.md"
KVSTORE = ROOT / "docs" / "examples" / "kvstore.py"


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """Return (line number, content) of each fenced block of `language`."""
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def test_the_python_of_the_authors_guide_runs_from_top_to_bottom() -> None:
    names: dict[str, object] = {"__name__": "authors"}
    found = [(page, *block) for page in (GUIDE, REFERENCE) for block in blocks(page, "python")]
    assert len(found) >= 6
    for page, line, source in found:
        # Empty lines before it: a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), names)
    for name in ("Counter", "Sampler", "Queues"):
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


WRONG = """
from vfu_dev.device import Device, Field, Region, Registers


class Wrong(Device):
    registers = Registers(0, [Field("a", 0, "<u4", "rw", "")])

    def __init__(self, *, memory_bytes: int) -> None:
        self.memory = Region(2, size_bytes=memory_bytes)
        super().__init__()
        self.memory.stroe(0, b"x")
        self.registers.on_write("a", self.hook)

    @registers.written("a")
    def hook(self) -> None: ...


Wrong(memory_bytes="1M")
"""


def test_what_authors_write_is_checked_by_a_type_checker(tmp_path: Path) -> None:
    """mypy, strict: nothing to object to in the guide, the examples and what `new-device` writes."""
    (tmp_path / "guide.py").write_text("\n".join(source for _, source in blocks(GUIDE, "python")))
    for example in (KVSTORE, KVSTORE.with_name("ring.py")):
        (tmp_path / example.name).write_text(example.read_text())
    made = CliRunner().invoke(cli, ["new-device", str(tmp_path / "mine.py")])
    assert made.exit_code == 0, made.output
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", *sorted(tmp_path.glob("*.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    errors = re.findall(r"^(.*?):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    lines = WRONG.splitlines()
    assert {(Path(file).name, lines[int(line) - 1].strip()) for file, line, _ in errors} == {
        ("wrong.py", 'self.memory.stroe(0, b"x")'),
        ("wrong.py", 'self.registers.on_write("a", self.hook)'),
        ("wrong.py", '@registers.written("a")'),
        ("wrong.py", 'Wrong(memory_bytes="1M")'),
    }, done.stdout + done.stderr


PAGES = sorted(
    page
    for page in (
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("native/**/*.md"),
        *ROOT.glob("deploy/*.md"),
    )
    if not {"results", "made"} & set(page.relative_to(ROOT).parts)  # written by scripts
)
# What ends a command in a shell's line.
_ENDS = {"|", "||", "&&", ";", "&", ">", ">>", "2>", "(", ")", "#"}
# A line of code, in a fence or indented; and code within a sentence.
_LINE = re.compile(r"^(?:\$ | {4,}|\t)?((?:\S+=\S+ |sudo |\S+/)*vfu-dev [^\n]*)$", re.MULTILINE)
_INLINE = re.compile(r"`(vfu-dev [^`]+)`")


def shown_commands(text: str) -> list[str]:
    """Return every command line of `vfu-dev` that a text shows, and what it names with an option."""
    within = [" ".join(code.split()) for code in _INLINE.findall(text)]
    return _LINE.findall(text) + [code for code in within if "--" in code]


def words_of(line: str) -> list[str]:
    """Return what follows `vfu-dev`, up to where the shell goes on with something else."""
    lexer = shlex.shlex(re.sub(r"\s#\s.*", "", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    words = words[next(at for at, word in enumerate(words) if word.endswith("vfu-dev")) + 1 :]
    end = next((at for at, word in enumerate(words) if word in _ENDS or word.startswith("#")), len(words))
    # Ellipses stand for what a page leaves out, NAME for any of those that there are.
    return [word for word in words[:end] if word.strip(".…") and word != "NAME"]


def text_of(page: Path) -> str:
    """Return a page; a Makefile with its variables expanded."""
    text = page.read_text().replace("\\\n", " ")
    if page.name == "Makefile":
        variables = dict(re.findall(r"^(\w+) *[:?]= *(.*)$", text, re.MULTILINE))
        while (expanded := re.sub(r"\$\((\w+)\)", lambda name: variables.get(name[1], ""), text)) != text:
            text = expanded
    return text


EXAMPLES = [(manual.title, line) for manual in manuals(cli) for line in manual.examples]
LINES = [
    *(
        pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}")
        for page in (*PAGES, ROOT / "Makefile")
        for line in shown_commands(text_of(page))
    ),
    *(pytest.param(line, id=f"{title} --help: {line}") for title, line in EXAMPLES),
]


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_that_a_page_shows_parses(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command exists, with the options and the values that it is shown with; its files need not.

    So do the examples of `--help`. Options that write a file make its folder, `$RUN/…` and `out/…` included.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
    monkeypatch.setattr(configfile, "_text_of", lambda path: "")
    command: click.Command = cli
    words, ctx = words_of(line), None
    while isinstance(command, click.Group):
        ctx = click.Context(command, parent=ctx)
        if command.params and words and not words[0].startswith("-"):
            del words[: sum(isinstance(param, click.Argument) for param in command.params)]  # ctl's socket
        if not words or words[0].startswith("-"):
            assert set(words) <= {"--help", "--version", "-h"}, f"no command in {line!r}"
            return
        if words[0] == "COMMAND":
            return
        with ctx:  # what finding a command changes in the process ends here
            _, found, words = command.resolve_command(ctx, words)
        assert found is not None
        command = found
    if "--help" not in words:
        command.make_context(str(command.name), words, parent=ctx)


def test_the_pages_show_commands() -> None:
    """Enough that nothing hides from the test above."""
    assert len(LINES) > 80
    assert len(EXAMPLES) > 40
    assert {page.name for page in PAGES} >= {"README.md", "cookbook.md", "load.md", "commands.md"}


def test_the_guides_configuration_file_is_one(tmp_path: Path) -> None:
    ((_, content),) = blocks(REFERENCE, "toml")
    (tmp_path / "dev.toml").write_text(content)
    ctx = serve.make_context("serve", ["--config", str(tmp_path / "dev.toml")])
    assert ctx.params["metrics_port"] == tomllib.loads(content)["metrics-port"] == 9470
    assert ctx.params["vendor_id"] == 0x1234
