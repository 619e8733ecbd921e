"""Figures for programs: JSON into a file, or to standard output."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from vfu_dev import JSON_VERSION
from vfu_dev.cli.shape import TO_STDOUT, JsonOption
from vfu_dev.errors import ConfigError, VfuDevError

_Command = TypeVar("_Command", bound=Callable[..., Any])


def json_option(what: str, *, any_word: bool = True) -> Callable[[_Command], _Command]:
    """Return the option `--json FILE`, argument `json_path`; `what` is written there, for --help.

    `-`, or nothing after `--json`, is standard output. A file that cannot be written is refused before the
    work starts; its folder is made. The command has to be a `shape.Command`.

    Args: any_word: see `JsonOption`; False where `--json` may stand before an argument.
    """
    rule = "" if any_word else ", a name that ends in .json or follows as --json=FILE"
    return click.option(
        "--json",
        "json_path",
        cls=JsonOption,
        any_word=any_word,
        metavar="FILE",
        callback=possible,
        help=f"{what} to this file{rule}; -, or no FILE, is standard output.",
    )


def versioned(value: Any) -> Any:
    """Return an object with the version of its keys, which is the first of them; other values as they are.

    A list is one of summaries, each with its own.
    """
    return {"version": JSON_VERSION, **value} if isinstance(value, dict) else value


def write_json(value: Any, path: str | None, *, indent: int | None = 2, append: bool = False) -> None:
    """Write `value` to the file of `--json`; `-` is standard output, None writes nothing.

    Args: append: add to what the file holds.
    Raises: VfuDevError: the file cannot be written, or not all of it.
    """
    write_text("--json", json.dumps(versioned(value), indent=indent) + "\n", path, append=append)


def write_text(option: str, text: str, path: str | None, *, append: bool = False) -> None:
    """Write `text` where `option` says; see `write_json`."""
    if path is None:
        return
    try:
        with click.open_file(path, "a" if append else "w") as file:
            file.write(text)
    except OSError as error:
        raise VfuDevError(f"{option} {path}: {error.strerror}") from error


def show_or_write(value: Any, path: str | None, text: Callable[[], str]) -> None:
    """Show `text()` on standard output, unless `value` goes there as JSON (see `write_json`)."""
    write_json(value, path)
    if path != TO_STDOUT and (shown := text()):
        click.echo(shown)


@contextlib.contextmanager
def announced(work: str) -> Iterator[None]:
    """Show on standard error that `work`, some seconds of it, is under way: a spinner, or one line."""
    from rich.console import Console  # which takes 0.1 s to import

    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(f"{work} …", err=True)
    with console.status(work):
        yield


def possible(_context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Return `path`, a file that can be written; its folder is made. Raises: ConfigError: it cannot be."""
    if path is None or path == TO_STDOUT:
        return path
    try:
        folder = Path(path).absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path if Path(path).exists() else folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{option.opts[-1]} {path}: {error.strerror}") from error
    return path
