"""Figures for programs: JSON into a file, or to standard output."""

from __future__ import annotations

import json
from typing import Any

import click

from vfu_dev.errors import VfuDevError


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
        raise VfuDevError(f"--json {path}: {error.strerror}") from error
