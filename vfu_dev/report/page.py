"""One HTML file about one migration: no scripts, no network."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from vfu_dev.report.plots import migration_figure, phases_figure, svg_text, write_png
from vfu_dev.sizes import format_size

# QEMU's log is long; the page shows this much of it, the JSON has all.
TRACE_LINES = 400


def _bytes(value: Any) -> str:
    return f"{format_size(value)}" if isinstance(value, int | float) else "unknown"


def _clock(value: float) -> str:
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def render(result: dict[str, Any]) -> str:
    """Return the page for the JSON of `lab migrate`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(size=_bytes, clock=_clock, shell=shlex.join)
    trace = result["qemu"]["trace_source"]
    return environment.get_template("page.html.j2").render(
        r=result,
        figure=svg_text(migration_figure(result)),
        phases=svg_text(phases_figure(result)) if result["devices"] else "",
        trace=trace[:TRACE_LINES],
        trace_left_out=max(0, len(trace) - TRACE_LINES),
        zero=result["samples"][0]["time"] if result["samples"] else result["started"],
    )


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write report.html and report.png into `folder` and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(render(result))
    write_png(migration_figure(result), folder / "report.png")
    return page
