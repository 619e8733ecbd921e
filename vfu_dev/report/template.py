"""The templates of this folder: their environment and its filters."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from vfu_dev.sizes import format_size

NOTHING = "\N{EN DASH}"  # a figure that is not known


def bytes_text(value: Any) -> str:
    """Return a number of bytes for people."""
    return f"{format_size(value)}" if isinstance(value, int | float) else NOTHING


def _rate(value: Any) -> str:
    return f"{format_size(value)}/s" if isinstance(value, int | float) else NOTHING


def milliseconds_text(seconds: Any) -> str:
    """Return seconds as milliseconds for people."""
    if not isinstance(seconds, int | float):
        return NOTHING
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def _clock(value: float) -> str:
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def render_template(name: str, **values: Any) -> str:
    """Return the text of the template `name` with `values`, which are escaped as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        # Older results lack some keys of newer ones; a missing value is shown as unknown.
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=bytes_text, rate=_rate, ms=milliseconds_text, clock=_clock, shell=shlex.join
    )
    return environment.get_template(name).render(values)
