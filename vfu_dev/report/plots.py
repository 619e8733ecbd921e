"""The pictures: one figure of a migration over time, one of the bytes of each phase."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vfu_dev.report.timeline import Series, Span, Timeline
from vfu_dev.sizes import format_size

# Okabe and Ito's palette: distinct for colour-blind readers too.
STATE_COLOURS = {
    "RUNNING": "#009e73",
    "PRE_COPY": "#56b4e9",
    "PRE_COPY_P2P": "#0072b2",
    "RUNNING_P2P": "#66c2a4",
    "STOP": "#999999",
    "STOP_COPY": "#d55e00",
    "RESUMING": "#e69f00",
    "ERROR": "#000000",
}
INITIAL, DIRTY, STOPPED, RAM = "#0072b2", "#e69f00", "#d55e00", "#999999"


def _mib(series: Series) -> list[float]:
    """Return byte counts in MiB, so that the axis has round numbers."""
    return [value / (1 << 20) for value in series.values]


def _draw_states(axes: Axes, timeline: Timeline) -> None:
    rows: list[tuple[str, list[Span]]] = []
    for device in timeline.result["devices"]:
        for side in ("source", "destination"):
            spans = timeline.spans(device.get(f"transitions_{side}") or [])
            rows.append((f"{device['name']} {side}", spans))
    for height, (_, spans) in enumerate(rows):
        for span in spans:
            width = span.end - span.start
            axes.barh(
                height, width, left=span.start, height=0.7, color=STATE_COLOURS.get(span.state, "#cc79a7")
            )
            if width > timeline.end * 0.06:
                axes.text(span.start + width / 2, height, span.state, ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("device states", loc="left", fontsize=9)


def _draw_remaining(axes: Axes, timeline: Timeline) -> None:
    many = len(timeline.result["devices"]) > 1
    for index, device in enumerate(timeline.result["devices"]):
        suffix = f" {device['name']}" if many else ""
        for key, colour, name in (("initial", INITIAL, "initial_bytes"), ("dirty", DIRTY, "dirty_bytes")):
            live = timeline.server("source", index, name)
            axes.plot(live.times, _mib(live), color=colour, lw=1.2, label=f"{name}{suffix} (server)")
            seen = timeline.trace("vfio_save_iterate", key, index)
            axes.plot(seen.times, _mib(seen), ".", color=colour, ms=3, alpha=0.6)
        exact = timeline.trace("vfio_state_pending_exact", "stop_copy", index)
        axes.plot(
            exact.times,
            _mib(exact),
            "x",
            color=STOPPED,
            ms=4,
            label=f"stop_copy_length{suffix} (QEMU asked)",
        )
    threshold = timeline.threshold_bytes()
    if threshold:
        axes.axhline(
            threshold / (1 << 20),
            color="black",
            lw=0.8,
            ls="--",
            label=f"switchover below {format_size(threshold)}",
        )
    axes.set_title("device data left to send (dots: QEMU's vfio_save_iterate)", loc="left", fontsize=9)
    axes.legend(fontsize=7, loc="upper right")
    axes.set_ylabel("MiB", fontsize=8)


def _draw_qemu(axes: Axes, timeline: Timeline) -> None:
    for path, colour, label in (
        (("ram", "remaining"), RAM, "RAM remaining"),
        (("ram", "transferred"), "#cc79a7", "transferred, device state included"),
        (("vfio", "transferred"), INITIAL, "device state transferred"),
    ):
        series = timeline.qemu(*path)
        axes.plot(series.times, _mib(series), color=colour, lw=1.2, label=label)
    axes.set_title("QEMU's own view (query-migrate)", loc="left", fontsize=9)
    axes.set_ylabel("MiB", fontsize=8)
    axes.legend(fontsize=7, loc="center left")
    expected = timeline.qemu("expected-downtime")
    if expected.values:
        right = axes.twinx()
        right.plot(
            expected.times,
            expected.values,
            color=STOPPED,
            lw=0.9,
            ls=":",
            label="expected downtime (RAM only)",
        )
        right.set_ylabel("ms", fontsize=8)
        right.set_ylim(bottom=0)
        right.legend(fontsize=7, loc="center right")


def migration_figure(result: dict[str, Any]) -> Figure:
    """Draw states, device data left and QEMU's view on one time axis."""
    timeline = Timeline(result)
    rows = max(2, 2 * len(result["devices"]))
    figure = Figure(figsize=(9, 4.6 + 0.3 * rows), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [0.35 * rows, 2.4, 1.9]})
    _draw_states(axes[0], timeline)
    _draw_remaining(axes[1], timeline)
    _draw_qemu(axes[2], timeline)
    axes[2].set_xlabel("seconds since the migration began")
    axes[2].set_xlim(0, timeline.end)
    for each in axes:
        each.grid(axis="x", lw=0.3)
        each.tick_params(labelsize=8)
    return figure


def phases_figure(result: dict[str, Any]) -> Figure:
    """Draw how many stream bytes each device sent in pre-copy and in stop-copy."""
    devices = result["devices"]
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(devices)), layout="constrained")
    axes = figure.subplots()
    names = [device["name"] for device in devices]
    before = [device["precopy_bytes"] / (1 << 20) for device in devices]
    after = [device["stop_copy_bytes"] / (1 << 20) for device in devices]
    axes.barh(names, before, color=INITIAL, label="pre-copy (device running)")
    axes.barh(names, after, left=before, color=STOPPED, label="stop-copy (device stopped)")
    for device, height in zip(devices, range(len(devices)), strict=True):
        axes.plot([device["size_bytes"] / (1 << 20)] * 2, [height - 0.4, height + 0.4], color="black", lw=1)
    axes.set_title("stream bytes by phase (line: size of the device's memory)", loc="left", fontsize=9)
    axes.set_xlabel("MiB", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="lower right")
    axes.invert_yaxis()
    return figure


def svg_text(figure: Figure) -> str:
    """Return a figure as an `<svg>` element to put into a page."""
    buffer = io.StringIO()
    # A fixed salt: the same result gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "vfu-dev", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as a picture for documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
