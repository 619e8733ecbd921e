"""The documentation as a whole: the site builds without a warning, pages are short, messages name pages."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import vfu_dev
from vfu_dev.cli import cli
from vfu_dev.cli.docs import titles
from vfu_dev.cli.manual import manuals, roff
from vfu_dev.migration.fsm import ARCS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = Path(vfu_dev.__file__).parent
# Lines. What is longer is two pages.
LONGEST_PAGE = 300


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it as `make docs` does."""
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    out = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--nitpicky", "--conf-dir", "docs/site"]
    command = [sys.executable, "-m", "sphinx", *options, "-d", out / "trees", ".", out / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_a_link_that_leads_nowhere_is_an_error(site: Path) -> None:
    """Without one, every page is in the contents, and every command in the reference."""
    contents = (site / "docs/index.html").read_text()
    for name in titles().keys() - {"index"}:
        assert (site / f"docs/{name}.html").is_file()
        assert f'href="{name}.html' in contents, f"{name} is in no table of docs/index.md"
    made = {path.stem for path in (site / "docs/site/made").glob("*.html")}
    assert {"serve", "lab", "ctl", "migrate"} <= made
    assert "vfu-dev lab migrate" in (site / "docs/site/made/lab.html").read_text()
    assert "--trace-registers" in (site / "docs/site/made/serve.html").read_text()


def test_pages_are_short() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in DOCS.glob("*.md")}
    assert max(long.values()) <= LONGEST_PAGE, long


def test_pages_that_messages_name_exist() -> None:
    """A message names a page by the command that shows it: a path means nothing to a wheel's user."""
    named: set[str] = set()
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.toml")]:
        for text in _texts(path):
            named |= set(re.findall(r"vfu-dev docs ([a-z][a-z-]+)", text))
            assert not re.search(r"docs/[a-z-]+\.md", text), f"{path}: {text}"
    assert {"faults", "load", "authors"} <= named
    assert named - {"fault"} <= set(titles())


def _texts(path: Path) -> list[str]:
    """Return what a user can see: strings that are no docstring but a command's; of another file all."""
    if path.suffix != ".py":
        return [path.read_text()]
    tree = ast.parse(path.read_text())
    hidden = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            is_command = isinstance(node, ast.FunctionDef) and "command" in ast.dump(
                ast.Module(node.decorator_list, [])  # type: ignore[arg-type]
            )
            if isinstance(first, ast.Expr) and not is_command:
                hidden.add(id(first.value))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in hidden)
    return [node.value for node in found if isinstance(node.value, str)]


def test_every_manual_page_is_one() -> None:
    """groff reads each without a word, where there is a groff; each has what --help has."""
    found = list(manuals(cli))
    assert len(found) > 25
    for manual in found:
        text = roff(manual)
        assert manual.summary, manual.title
        for names, _ in manual.options:
            assert names.replace("\\", "\\e").replace("-", "\\-") in text, (manual.title, names)
        for line in text.splitlines():
            assert not line.startswith("'"), (manual.title, line)
            assert not line.startswith(".") or re.match(r"\.(TH|SH|B|TP|PP|nf|fi)\b", line), line


def test_the_drawings_are_the_present_ones() -> None:
    """docs/img/draw_architecture.py makes them from the table of arcs; both have a description."""
    drawn = runpy.run_path(str(DOCS / "img/draw_architecture.py"))
    for name, draw in drawn["PICTURES"].items():
        text = draw()
        assert (DOCS / "img" / name).read_text() == text
        picture = ElementTree.fromstring(text)
        assert picture.get("role") == "img"
        assert picture.find("{http://www.w3.org/2000/svg}desc") is not None
    for arc in ARCS:
        assert f"{arc.origin.name} to {arc.target.name}: {arc.action.value}" in drawn["states"]()
