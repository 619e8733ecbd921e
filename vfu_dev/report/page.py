"""One HTML file about one migration: no scripts, no network. And its pictures for documents."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vfu_dev import JSON_VERSION
from vfu_dev.errors import ConfigError
from vfu_dev.report.drawing import svg_text, write_png
from vfu_dev.report.excerpt import excerpt
from vfu_dev.report.passes import pass_list, passes_figure, phases_figure
from vfu_dev.report.plots import migration_figure
from vfu_dev.report.qemus import qemus_text
from vfu_dev.report.template import render_template
from vfu_dev.report.timeline import Timeline
from vfu_dev.whole import write_whole
from vfu_dev.workload import Workload

KIND = "lab-migrate"
# QEMU's log is long; the page shows this much of it, the JSON has all.
LINES = 400
# matplotlib's picture of each, by the name of its file.
PICTURES = {"migration": migration_figure, "passes": passes_figure, "phases": phases_figure}


def read_report(path: Path) -> dict[str, Any]:
    """Return the result of a lab run that `path` holds.

    Raises: ConfigError: the file cannot be read, or holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(result, dict) or result.get("kind") != KIND:
        found = result.get("kind", "no kind") if isinstance(result, dict) else type(result).__name__
        raise ConfigError(
            f"{path}: not a result of `vfu-dev lab migrate` (expected {KIND!r}, found {found!r})"
        )
    version = result.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= JSON_VERSION:
        raise ConfigError(f"{path}: version {version!r}: expected 1 to {JSON_VERSION}")
    return result


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a result that lacks something into an error that names the file.

    Raises:  ConfigError: a key is missing, or holds something else.
    """
    try:
        yield
    except KeyError as error:
        raise ConfigError(f"{path}: the result has no {error}") from error
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: the result holds something unexpected: {error}") from error


def _reached(result: dict[str, Any]) -> str:
    """Return the rate that the guest reached beside what was asked for, in the unit of the latter."""
    return Workload.from_dict(result["settings"]["load"]).reached_text(result["guest"])


def _headline(result: dict[str, Any]) -> str:
    """Return what became of it in a word or three."""
    status: str = result["qemu"]["status"]
    stood = result.get("convergence") or {}
    if status == "completed":
        return "completed" if result["status"] == "completed" else "completed, but not as it should be"
    if status == "none":
        return "did not start"
    return f"{status}, not converging" if stood.get("converging") is False else status


def render(result: dict[str, Any]) -> str:
    """Return the page for the JSON of `lab migrate`."""
    figures = {name: draw(result) for name, draw in PICTURES.items()}
    qemu, zero = result["qemu"], Timeline(result).zero
    sides = {}
    for side in ("source", "destination"):
        trace = qemu[f"trace_{side}"]
        sides[side] = {
            "excerpt": excerpt(trace, zero),
            "trace": trace[:LINES],
            "trace_left_out": max(0, len(trace) - LINES),
            "events": qemu[f"events_{side}"][-LINES:],
            "states": qemu[f"states_{side}"],
            "vm": qemu.get(f"run_state_{side}"),
            "command": qemu[f"command_line_{side}"],
        }
    return render_template(
        "page.html.j2",
        r=result,
        qemus=qemus_text(qemu),
        headline=_headline(result),
        figures={name: svg_text(figure, name) for name, figure in figures.items() if figure is not None},
        passes={device["name"]: pass_list(device) for device in result["devices"]},
        reached=_reached(result) if result["guest"] else "",
        sides=sides,
        zero=zero,
    )


def write_page(result: dict[str, Any], path: Path) -> None:
    """Write the page to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(result))


def write_pictures(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures into `folder`, those that have something to show, and return their paths."""
    written = []
    for name, draw in PICTURES.items():
        figure = draw(result)
        if figure is not None:
            written.append(folder / f"{name}.png")
            write_png(figure, written[-1])
    return written


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write report.html and report.png into `folder` and return the page's path."""
    page = folder / "report.html"
    write_page(result, page)
    write_png(migration_figure(result), folder / "report.png")
    return page
