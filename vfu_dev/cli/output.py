"""Figures for programs: JSON into a file, or to standard output."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from vfu_dev.errors import VfuDevError

_Command = TypeVar("_Command", bound=Callable[..., Any])

TO_STDOUT = "-"


def json_option(what: str) -> Callable[[_Command], _Command]:
    """Return the option `--json FILE`, argument `json_path`; `what` is written there, for --help.

    A place that cannot be is refused before the work whose figures would go there; its folder is made.
    """
    return click.option(
        "--json", "json_path", metavar="FILE", callback=_possible, help=f"{what} (-: stdout)."
    )


def write_json(value: Any, path: str | None) -> None:
    """Write `value` where `--json` says: a file, `-` for standard output, nowhere for None.

    Raises:  VfuDevError: the file cannot be written, or not all of it.
    """
    if path is None:
        return
    try:
        with click.open_file(path, "w") as file:
            file.write(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise _refused(path, error) from error


def _possible(_context: click.Context, _option: click.Parameter, path: str | None) -> str | None:
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
        raise _refused(path, error) from error
    return path


def _refused(path: str, error: OSError) -> VfuDevError:
    return VfuDevError(f"--json {path}: {error.strerror}")
