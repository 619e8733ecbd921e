"""The course of a migration: states, data left, rates, downtime and QEMU's view on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from vfu_dev.qemu_events import Kind
from vfu_dev.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    INK,
    MIB,
    ORANGE,
    PINK,
    RED,
    SKY,
    WIDTH_INCHES,
    draw,
    in_mib,
    label_once,
    legend,
    title,
)
from vfu_dev.report.timeline import Series, Timeline
from vfu_dev.sizes import format_size

STATE_COLOURS = {
    "RUNNING": GREEN,
    "PRE_COPY": SKY,
    "PRE_COPY_P2P": BLUE,
    "RUNNING_P2P": "#3a9f80",
    "STOP": "#949494",
    "STOP_COPY": RED,
    "RESUMING": ORANGE,
    "ERROR": BLACK,
}
# States whose bars have dark text.
LIGHT_STATES = {"PRE_COPY", "RUNNING_P2P", "STOP", "STOP_COPY", "RESUMING"}


def draw_state(axes: Axes, row: int, start: float, width: float, state: str, named: bool) -> None:
    """Draw a state that was held as a bar in `row`, with its name inside if `named`."""
    colour = STATE_COLOURS.get(state, PINK)
    # The edge keeps a state of a millisecond visible.
    axes.barh(row, width, left=start, height=0.72, color=colour, edgecolor=colour, linewidth=1)
    if named:
        axes.text(
            start + width / 2,
            row,
            state,
            ha="center",
            va="center",
            fontsize=7.5,
            color=INK if state in LIGHT_STATES else "white",
        )


def _draw_states(axes: Axes, timeline: Timeline) -> None:
    names: list[str] = []
    seen: set[str] = set()
    for device in timeline.result["devices"]:
        for side in ("source", "destination"):
            height = len(names)
            names.append(f"{device['name']} {side}")
            for span in timeline.spans(device.get(f"transitions_{side}") or []):
                seen.add(span.state)
                width = span.end - span.start
                draw_state(axes, height, span.start, width, span.state, width > timeline.end * 0.12)
    title(axes, "Device states")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    patches = [Patch(color=colour, label=state) for state, colour in STATE_COLOURS.items() if state in seen]
    if patches:
        columns = 1 + (len(patches) > 2 * max(2, len(names)))
        axes.legend(
            handles=patches,
            fontsize=7.5,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.03),
            borderaxespad=0,
            frameon=False,
            ncols=columns,
            labelspacing=0.2,
        )


def _draw_remaining(axes: Axes, timeline: Timeline) -> None:
    count = len(timeline.result["devices"])
    labels = {
        key: label_once(text, count)
        for key, text in (
            ("initial_bytes", "initial_bytes"),
            ("dirty_bytes", "dirty_bytes"),
            ("iterate", "both sizes, as QEMU\nread them (trace)"),
            ("exact", "stop_copy_length, as\nQEMU read it (trace)"),
        )
    }
    for index in range(count):
        for key, colour, traced in (("initial_bytes", BLUE, "initial"), ("dirty_bytes", ORANGE, "dirty")):
            draw(axes, in_mib(timeline.server("source", index, key)), next(labels[key]), colour)
            seen = in_mib(timeline.trace(Kind.ITERATE, traced, index))
            label = next(labels["iterate"]) if key == "initial_bytes" else None
            draw(axes, seen, label, colour, ".", alpha=0.6)
        exact = in_mib(timeline.trace(Kind.PENDING_EXACT, "stop_copy", index))
        draw(axes, exact, next(labels["exact"]), RED, "x")
    threshold = timeline.row("threshold_bytes")
    if threshold.values:
        draw(
            axes,
            in_mib(threshold),
            f"QEMU switches over\nbelow {format_size(threshold.values[-1])}",
            BLACK,
            "--",
            lw=0.9,
        )
    axes.set_ylim(bottom=0)
    title(axes, "Device data left to send", "MiB")
    legend(axes)


def _draw_rates(axes: Axes, timeline: Timeline) -> None:
    count = len(timeline.result["devices"])
    for key, text, colour in (
        ("dirty_rate_bytes_per_second", "dirty rate", ORANGE),
        ("transfer_rate_bytes_per_second", "transfer rate", BLUE),
    ):
        labels = label_once(text, count)
        for index in range(count):
            draw(axes, timeline.sampled(index, key, 1 / MIB), next(labels), colour)
    axes.set_ylim(bottom=0)
    title(axes, "Rates: the migration converges while the transfer rate is above the dirty rate", "MiB/s")
    legend(axes)


def _draw_downtime(axes: Axes, timeline: Timeline) -> None:
    result, qemu = timeline.result, timeline.result["qemu"]
    count = len(result["devices"])
    labels = label_once("predicted downtime\n(the device's server)", count)
    measured = label_once("measured downtime\n(the device's server)", count)
    for index, device in enumerate(result["devices"]):
        predicted = timeline.sampled(index, "predicted_downtime_seconds", 1000)
        draw(axes, _positive(predicted), next(labels), BLUE)
        stopped, found = timeline.stopped(index), device.get("downtime_seconds")
        if found and stopped is not None:
            draw(axes, Series([stopped], [found * 1000]), next(measured), RED, "D", ms=9)
    expected = _positive(timeline.qemu("expected-downtime"))
    draw(axes, expected, "QEMU's expected-downtime\n(RAM only)", GREY, lw=3, alpha=0.5)
    stopped = timeline.stopped(0) if count else None
    if qemu.get("downtime_ms") and stopped is not None:
        draw(axes, Series([stopped], [qemu["downtime_ms"]]), "measured downtime (QEMU)", BLACK, "*", ms=8)
    limit = qemu.get("downtime_limit_ms")
    if limit:
        limits = timeline.downtime_limits()
        told = f"downtime limit {limit} ms" + (", at the end" if len(set(limits.values)) > 1 else "")
        draw(axes, limits, told, BLACK, "--", lw=0.9, drawstyle="steps-post")
    axes.set_yscale("log")
    axes.set_ylim(
        *_decades([float(value) for line in axes.get_lines() for value in np.ravel(line.get_ydata())])
    )
    title(axes, "Downtime, if the device stopped now", "ms")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=10))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", lw=0.3)
    legend(axes)


def _positive(series: Series) -> Series:
    """Return the points that a logarithmic axis can show."""
    points = [(at, value) for at, value in zip(series.times, series.values, strict=True) if value > 0]
    return Series([at for at, _ in points], [value for _, value in points])


def _decades(values: list[float]) -> tuple[float, float]:
    """Return limits of a logarithmic axis around `values`, a factor of 10 apart at least."""
    low, high = min(values, default=10.0) / 1.5, max(values, default=100.0) * 1.5
    return min(low, high / 10), high


def _draw_qemu(axes: Axes, timeline: Timeline) -> None:
    for path, colour, label, width in (
        (("ram", "remaining"), GREY, "RAM remaining", 1.2),
        # It mostly coincides with the next curve, so it is drawn wider.
        (("ram", "transferred"), PINK, "transferred in all,\ndevice state included", 3.0),
        (("vfio", "transferred"), BLUE, "device state transferred", 1.2),
    ):
        draw(axes, in_mib(timeline.qemu(*path)), label, colour, lw=width)
    axes.set_ylim(bottom=0)
    title(axes, "QEMU's own view (query-migrate)", "MiB")
    legend(axes)


def _mark_steps(axes: Sequence[Axes], timeline: Timeline) -> None:
    """Draw where a rule of the policy acted, through all panels, and in the first of them what it set."""
    for step in timeline.result.get("policy") or []:
        at = step["time"] - timeline.zero
        for each in axes:
            each.axvline(at, color=PINK, lw=1, ls="--")
        text = ", ".join(f"{name}={value}" for name, value in step["parameters"].items())
        across = axes[0].get_xaxis_transform()
        axes[0].text(
            at, 0.98, text, transform=across, rotation=90, ha="right", va="top", fontsize=6.5, color=PINK
        )


def migration_figure(result: dict[str, Any]) -> Figure:
    """Draw the whole course on one time axis."""
    timeline = Timeline(result)
    rows = max(2, 2 * len(result["devices"]))
    heights = [0.45 + 0.25 * rows, 2.1, 1.5, 1.8, 1.6]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(5, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    panels = (_draw_states, _draw_remaining, _draw_rates, _draw_downtime, _draw_qemu)
    for each, panel in zip(axes, panels, strict=True):
        panel(each, timeline)
        if not each.has_data():
            note = "no samples: PRE_COPY was too short, or there was none"
            each.text(0.5, 0.5, note, transform=each.transAxes, ha="center", va="center", fontsize=8.5)
            each.set_yticks([])
        each.grid(axis="x", lw=0.3)
        each.tick_params(axis="x", labelbottom=True)
    _mark_steps(axes[1:], timeline)
    axes[-1].set_xlabel("seconds since the migration began", fontsize=8.5)
    axes[-1].set_xlim(0, timeline.end)
    return figure
