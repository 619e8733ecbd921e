"""`vfu-dev docs`: the pages that messages point to, as text, wherever vfu-dev is installed."""

from __future__ import annotations

import re
from pathlib import Path

import click

import vfu_dev
from vfu_dev.cli.completing import offer
from vfu_dev.cli.output import json_option, show_or_write
from vfu_dev.cli.shape import Command
from vfu_dev.errors import BuildError, ConfigError, nearest


def docs_folder() -> Path:
    """Return docs/: of the checkout that this package runs from, else the copy that a wheel carries.

    Raises: BuildError: neither is there.
    """
    package = Path(vfu_dev.__file__).resolve().parent
    for folder in (package.parent / "docs", package / "_docs"):
        if (folder / "commands.md").is_file():
            return folder
    raise BuildError(f"docs/ is neither beside nor in {package}: the installation is incomplete")


def titles() -> dict[str, str]:
    """Return name -> first heading of every page."""
    found = {}
    for path in sorted(docs_folder().glob("*.md")):
        heading = re.search(r"^# (.+)$", path.read_text(), re.MULTILINE)
        found[path.stem] = heading[1] if heading else ""
    return found


@click.command(
    cls=Command,
    help="Show PAGE of the documentation, or list the pages. Messages name them: `vfu-dev docs faults`.",
    examples=["vfu-dev docs", "vfu-dev docs faults"],
)
@click.argument("page", required=False, shell_complete=offer(titles, files=False))
@click.option("--path", "only_path", is_flag=True, help="Print the path of the page, or of the folder.")
@json_option("Write names, titles and paths of the pages as JSON", any_word=False)
def command(page: str | None, only_path: bool, json_path: str | None) -> None:
    """Show a page through the terminal's pager; unchanged where standard output is no terminal."""
    pages = titles()
    if page is None:
        folder, width = docs_folder(), max(map(len, pages))
        found = [
            {"name": name, "title": title, "path": str(folder / f"{name}.md")}
            for name, title in pages.items()
        ]
        listed = "\n".join(f"{name:{width}}  {title}" for name, title in pages.items())
        show_or_write({"pages": found}, json_path, lambda: str(folder) if only_path else listed)
        return
    if json_path is not None:
        raise ConfigError(f"--json lists the pages, so leave {page!r} out")
    name = page.removeprefix("docs/").removesuffix(".md")
    if name not in pages:
        near = nearest(name, pages)
        hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(pages)}"
        raise ConfigError(f"no page is called {page!r}; {hint}")
    path = docs_folder() / f"{name}.md"
    if only_path:
        click.echo(str(path))
    else:
        click.echo_via_pager(path.read_text())
