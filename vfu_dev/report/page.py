"""One HTML file about one migration, without scripts or network access, and its pictures as PNG."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vfu_dev import JSON_VERSION
from vfu_dev.errors import ConfigError
from vfu_dev.report.drawing import svg_text, themed, write_png
from vfu_dev.report.excerpt import excerpt
from vfu_dev.report.passes import pass_list, passes_figure, phases_figure
from vfu_dev.report.plots import migration_figure
from vfu_dev.report.qemus import link_text, qemus_text
from vfu_dev.report.switchover import switchover, switchover_figure
from vfu_dev.report.template import bytes_text, milliseconds_text, render_template
from vfu_dev.report.timeline import Timeline
from vfu_dev.whole import write_whole
from vfu_dev.workload import Workload

KIND = "lab-migrate"
# QEMU's log is long; the page shows this much of it, the JSON has all.
LINES = 400
# matplotlib's picture of each, by the name of its file.
PICTURES = {
    "migration": migration_figure,
    "switchover": switchover_figure,
    "passes": passes_figure,
    "phases": phases_figure,
}
CAPTIONS = {
    "migration": "The whole migration on one axis: states of both servers, device data "
    "left, rates, downtimes, and QEMU's figures",
    "switchover": "The switchover alone: the states of each side until all devices run again",
    "passes": "Bytes and pages of each pass over dirty data",
    "phases": "Stream bytes sent while the device ran, and while it stood still",
}
# Id -> heading, in the order of the page.
PARTS = {
    "verification": "Verification",
    "convergence": "Does it converge?",
    "downtime": "Downtime",
    "switchover": "Switchover",
    "course": "Over time",
    "passes": "Passes",
    "trace": "QEMU's VFIO trace",
    "versions": "Versions and command lines",
}


def read_report(path: Path) -> dict[str, Any]:
    """Return the result of a lab run in the file `path`.

    Raises: ConfigError: the file cannot be read, or is no such result.
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
    """Turn the errors of an incomplete result into one that names the file.

    Raises: ConfigError: a key is missing, or has an unexpected value.
    """
    try:
        yield
    except KeyError as error:
        raise ConfigError(f"{path}: the result has no {error}") from error
    except (TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: the result holds something unexpected: {error}") from error


def _reached(result: dict[str, Any]) -> str:
    """Return the rate that the guest reached, in the unit of the requested rate."""
    return Workload.from_dict(result["settings"]["load"]).reached_text(result["guest"])


def _headline(result: dict[str, Any]) -> str:
    """Return the migration's status for the headline."""
    status: str = result["qemu"]["status"]
    stood = result.get("convergence") or {}
    if status == "completed":
        return "completed" if result["status"] == "completed" else "completed, but a check failed"
    if status == "none":
        return "did not start"
    return f"{status}, not converging" if stood.get("converging") is False else status


def _verified(result: dict[str, Any]) -> str:
    """Return what was compared; empty if nothing was."""
    guest = result.get("guest") or {}
    matches = [device.get("digest_match") for device in result["devices"]]
    if guest.get("verified") is False or (any(matches) and not all(matches)):
        return "NOT as it was"
    if guest.get("verified"):
        return "verified"
    return "digests equal" if matches and all(matches) else ""


def _outcome(result: dict[str, Any]) -> str:
    """Return the outcome, the page's first line: `completed, 24 ms of 300 ms, verified`."""
    qemu = result["qemu"]
    if qemu["status"] != "completed" or not isinstance(qemu.get("downtime_ms"), int):
        return _headline(result)
    joined = "above the limit of" if _is_late(result) else "of"
    stood = f"{qemu['downtime_ms']} ms {joined} {qemu['downtime_limit_ms']} ms"
    return ", ".join(filter(None, [_headline(result), stood, _verified(result)]))


def _is_late(result: dict[str, Any]) -> bool:
    """Return whether the downtime was above its limit."""
    qemu = result["qemu"]
    return isinstance(qemu.get("downtime_ms"), int) and qemu["downtime_ms"] > qemu["downtime_limit_ms"]


def _tiles(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, value and remark of the main figures."""
    qemu, devices = result["qemu"], result["devices"]
    before = sum(device.get("precopy_bytes") or 0 for device in devices)
    after = sum(device.get("stop_copy_bytes") or 0 for device in devices)
    tiles = []
    if isinstance(qemu.get("downtime_ms"), int):
        tiles.append(
            ("Downtime (QEMU)", f"{qemu['downtime_ms']} ms", f"limit {qemu['downtime_limit_ms']} ms")
        )
    own = [device["downtime_seconds"] for device in devices if device.get("downtime_seconds") is not None]
    if own:
        more = "the longest of the devices" if own[1:] else "from its stop to the end of its saving"
        tiles.append(("Downtime (device)", milliseconds_text(max(own)), more))
    if isinstance(qemu.get("total_ms"), int):
        tiles.append(("Total time", f"{qemu['total_ms'] / 1000:.2f} s", ""))
    if before + after:
        share = f"{100 * before / (before + after):.1f} % in pre-copy"
        tiles.append(("Device state", bytes_text(before + after), share))
    if passes := [device["passes"] for device in devices if device.get("passes")]:
        tiles.append(("Passes", str(max(passes)), "the most of a device" if passes[1:] else ""))
    if verified := _verified(result):
        compared = (result.get("guest") or {}).get("compared_bytes")
        tiles.append(("Content", verified, f"{bytes_text(compared)} read back" if compared else ""))
    return tiles


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
            "trace_lines": sum(1 + event.get("repeated", 0) for event in trace),
            "events": qemu[f"events_{side}"][-LINES:],
            "states": qemu[f"states_{side}"],
            "vm": qemu.get(f"run_state_{side}"),
            "command": qemu[f"command_line_{side}"],
        }
    return render_template(
        "page.html.j2",
        r=result,
        qemus=qemus_text(qemu),
        link=link_text(result["link"]) if result.get("link") else "",
        headline=_headline(result),
        outcome=_outcome(result),
        is_late=_is_late(result),
        who="The lab" if (result.get("guest") or {}).get("kind") == "none" else "The guest",
        tiles=_tiles(result),
        parts={name: text for name, text in PARTS.items() if _has(name, result, figures)},
        captions=CAPTIONS,
        switchover=switchover(result),
        figures={
            name: themed(svg_text(figure, name), CAPTIONS[name])
            for name, figure in figures.items()
            if figure is not None
        },
        passes={device["name"]: pass_list(device) for device in result["devices"]},
        reached=_reached(result) if result["guest"] else "",
        sides=sides,
        zero=zero,
    )


def _has(part: str, result: dict[str, Any], figures: dict[str, Any]) -> bool:
    """Return whether the page has the section."""
    if part == "convergence":
        return bool(result.get("convergence"))
    return part not in figures or figures[part] is not None


def write_page(result: dict[str, Any], path: Path) -> None:
    """Write the page to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(result))


def write_pictures(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures that have data into `folder`, and return their paths."""
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
