"""Manual pages, the reference of commands and shell completion, all from what --help says.

python -m vfu_dev.cli.manual DIR      share/man, share/bash-completion, ... in DIR, as a wheel installs them
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from vfu_dev import __version__

PROGRAM = "vfu-dev"
COMPLETE_VARIABLE = "_VFU_DEV_COMPLETE"

BAR = "\\|"  # within a cell of a table in Markdown

# Where each shell looks, below a prefix.
_COMPLETIONS = {
    "bash": f"bash-completion/completions/{PROGRAM}",
    "zsh": f"zsh/site-functions/_{PROGRAM}",
    "fish": f"fish/vendor_completions.d/{PROGRAM}.fish",
}


@dataclass(frozen=True)
class Manual:
    """What one command's --help says.

    Attributes:
        words: the command with what is before it: ("vfu-dev", "lab", "migrate").
        usage: its arguments.
        paragraphs: of its description; True for one whose lines stay as they are.
        options: (names, help) of each that is shown.
        commands: (name, help) of each below it.
        examples: command lines.
    """

    words: tuple[str, ...]
    usage: str
    paragraphs: tuple[tuple[bool, str], ...]
    options: tuple[tuple[str, str], ...]
    commands: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]

    @property
    def page(self) -> str:
        """The name of its manual page: `vfu-dev-lab-migrate`."""
        return "-".join(self.words)

    @property
    def title(self) -> str:
        """The command as it is typed."""
        return " ".join(self.words)

    @property
    def summary(self) -> str:
        """The first sentence of the description, without its full stop."""
        text = " ".join(self.paragraphs[0][1].split()) if self.paragraphs else ""
        return re.split(r"(?<=[^.])\.(?:\s|$)", text, maxsplit=1)[0]


def manuals(
    command: click.Command, words: tuple[str, ...] = (PROGRAM,), parent: click.Context | None = None
) -> Iterator[Manual]:
    """Yield the manual of `command` and of all below it."""
    ctx = click.Context(command, info_name=words[-1], parent=parent)
    below: dict[str, click.Command] = {}
    if isinstance(command, click.Group):
        names = command.list_commands(ctx)
        below = {name: found for name in names if (found := command.get_command(ctx, name))}
    records = [param.get_help_record(ctx) for param in command.get_params(ctx)]
    yield Manual(
        words=words,
        usage=" ".join(command.collect_usage_pieces(ctx)),
        paragraphs=tuple(_paragraphs(command)),
        options=tuple(record for record in records if record is not None and record[1]),
        commands=tuple((name, one.get_short_help_str(200)) for name, one in below.items() if not one.hidden),
        examples=tuple(getattr(command, "examples", ())),
    )
    for name, one in below.items():
        if not one.hidden:
            yield from manuals(one, (*words, name), ctx)


def _paragraphs(command: click.Command) -> Iterator[tuple[bool, str]]:
    text = inspect.cleandoc(command.help or "").partition("\f")[0]
    for part in re.split(r"\n\s*\n", f"{text}\n\n{command.epilog or ''}"):
        part = part.strip("\n")
        if part.startswith("\b"):
            yield True, part.removeprefix("\b").strip("\n")
        elif part.strip():
            yield False, part.strip()


def roff(manual: Manual, also: tuple[str, ...] = ()) -> str:
    """Return the manual page, for man(7); `also` are other pages to name."""
    lines = [
        f'.TH "{manual.page.upper()}" 1 "" "{PROGRAM} {__version__}" "{PROGRAM}"',
        ".SH NAME",
        f"{_roff(manual.page)} \\- {_roff(manual.summary)}",
        ".SH SYNOPSIS",
        f".B {_roff(manual.title)}",
        _roff(manual.usage),
        ".SH DESCRIPTION",
    ]
    for verbatim, text in manual.paragraphs:
        lines += [".nf", _roff(text), ".fi", ".PP"] if verbatim else [_roff(" ".join(text.split())), ".PP"]
    for heading, rows in (("COMMANDS", manual.commands), ("OPTIONS", manual.options)):
        if rows:
            lines.append(f".SH {heading}")
            for name, text in rows:
                lines += [".TP", f".B {_roff(name)}", _roff(" ".join(text.split()))]
    if manual.examples:
        lines += [".SH EXAMPLES", ".nf", *map(_roff, manual.examples), ".fi"]
    lines += [
        ".SH EXIT STATUS",
        _roff("0 as asked, 1 failed, 2 usage, 3 reached less than asked, 128+N ended by signal N."),
    ]
    lines += [".SH SEE ALSO", _roff(", ".join([*(f"{page}(1)" for page in also), "vfu-dev docs"]))]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    """Return `text` so that man(7) shows it as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def markdown(manual: Manual, level: int = 2) -> str:
    """Return the section of the reference of commands."""
    lines = [f"{'#' * level} {manual.title}", "", f"```text\n{manual.title} {manual.usage}\n```", ""]
    for verbatim, text in manual.paragraphs:
        lines += [f"```text\n{text}\n```" if verbatim else _escaped(" ".join(text.split())), ""]
    for heading, rows in (("Command", manual.commands), ("Option", manual.options)):
        if rows:
            lines += [f"| {heading} | |", "|---|---|"]
            for name, text in rows:
                cells = (f"`{name}`", _escaped(" ".join(text.split())))
                lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
            lines.append("")
    if manual.examples:
        lines += ["```console", *(f"$ {line}" for line in manual.examples), "```", ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Return `text` so that Markdown shows it as it is; what stands in backticks is code there, too."""
    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [re.sub(r"([*_<>\[\]`{}%$^~])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def completion(command: click.Command, shell: str) -> str:
    """Return the completion script for `shell`: bash, zsh or fish."""
    made = get_completion_class(shell)
    assert made is not None
    return made(command, {}, PROGRAM, COMPLETE_VARIABLE).source_template % {
        "complete_func": f"_{PROGRAM.replace('-', '_')}_completion",
        "complete_var": COMPLETE_VARIABLE,
        "prog_name": PROGRAM,
    }


def write_share(folder: Path) -> None:
    """Fill `folder`, a share/ below some prefix, with manual pages and completion for bash, zsh and fish."""
    from vfu_dev.cli import cli

    found = list(manuals(cli))
    pages = folder / "man" / "man1"
    pages.mkdir(parents=True, exist_ok=True)
    for manual in found:
        near = (other for other in found if other.words[:-1] in (manual.words, manual.words[:-1]))
        also = tuple(other.page for other in near if other is not manual)
        (pages / f"{manual.page}.1").write_text(roff(manual, also))
    for shell, where in _COMPLETIONS.items():
        path = folder / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(completion(cli, shell))


if __name__ == "__main__":
    write_share(Path(sys.argv[1]) / "share")
