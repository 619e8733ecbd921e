"""The documentation as a site: `make docs`, which is `sphinx-build -W -n -c docs/site . out/site`.

The sources are the pages where they are, so that links between them are the same on a site and in a checkout.
A link that leads nowhere, to a page, a heading or a file, is an error.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vfu_dev import __version__  # noqa: E402 - from this checkout
from vfu_dev.cli import cli  # noqa: E402
from vfu_dev.cli.manual import manuals, markdown  # noqa: E402

project = "vfu-dev"
author = "the vfu-dev authors"
version = release = __version__
language = "en"

extensions = ["myst_parser"]
root_doc = "docs/index"
# About the project, at the end of the contents.
PROJECT = [
    name
    for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY", "tests/README")
    if (ROOT / f"{name}.md").is_file()
]
include_patterns = [
    "README.md",
    *(f"{name}.md" for name in PROJECT),
    "docs/*.md",
    "docs/site/made/*.md",
    "native/*.md",
    "native/*/*.md",
    "native/spec/*.rst",
    "deploy/*.md",
]
exclude_patterns = ["out", ".venv"]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.xref_ambiguous"]

html_theme = "furo"
html_title = f"vfu-dev {__version__}"
html_static_path = ["static"]
html_css_files = ["vfu-dev.css"]
html_extra_path = ["front"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def _toctrees(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the first page the contents of the site: each table of docs/index.md is a part of them."""
    if docname == root_doc:
        source[0] += _contents(source[0])


def _contents(text: str) -> str:
    parts = [_toctree("Start", "vfu-dev </README>")]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        caption, _, body = section.partition("\n")
        rows = "\n".join(line for line in body.splitlines() if line.startswith("| "))
        pages = re.findall(r"\]\(([\w./-]+)\.(?:md|rst)\)", rows)
        if pages:
            named = [f"/{_normal(page)}" for page in pages]
            if caption.startswith("Reference"):
                named.insert(1, "/docs/site/made/reference")
            entries = "\n".join(named)
            parts.append(
                f":::{{toctree}}\n:hidden:\n:caption: {caption.partition(':')[0]}\n\n{entries}\n:::\n"
            )
    others = "\n".join(f"/{name}" for name in (*PROJECT, "deploy/README"))
    parts.append(_toctree("Project", others))
    return "\n\n" + "\n".join(parts)


def _toctree(caption: str, entries: str) -> str:
    return f":::{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n:::\n"


def _normal(page: str) -> str:
    parts: list[str] = ["docs"]
    for part in page.split("/"):
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _commands(_app: Sphinx) -> None:
    """Write the reference of commands, from what --help says."""
    made = ROOT / "docs/site/made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    found = list(manuals(cli))
    groups: dict[str, list[str]] = {}
    for manual in found[1:]:
        groups.setdefault(manual.words[1], []).append(markdown(manual, level=min(len(manual.words), 3) - 1))
    for name, sections in groups.items():
        (made / f"{name}.md").write_text("\n".join(sections))
    rows = "\n".join(
        f"| [{one.title}]({one.words[1]}.md) | {one.summary} |" for one in found if len(one.words) == 2
    )
    toctree = _toctree("Commands", "\n".join(groups))
    head = "# Every command\n\nMade from `--help`. [What holds for all of them](../../commands.md).\n\n"
    (made / "reference.md").write_text(f"{head}| Command | |\n|---|---|\n{rows}\n\n{toctree}")


def setup(app: Sphinx) -> None:
    """Hook in what is made, not written."""
    for name in (
        "trace",
        "trace-cancel",
        "trace-destination",
    ):  # blocks that a test looks for in QEMU's trace
        app.add_lexer(name, TextLexer)
    app.connect("builder-inited", _commands)
    app.connect("source-read", _toctrees)
