"""What more devices, or larger ones, cost: time, downtime and memory over the size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vfu_dev.report.drawing import BLUE, ORANGE, WIDTH_INCHES, legend, title
from vfu_dev.series.rows import METRICS

_GIB = 1 << 30
# Swept key -> heading of the axis, and what one unit there is.
_SIZES = {"device.memory": ("memory of the device, GiB", _GIB), "device.devices": ("devices in the VM", 1)}
_PANELS = (
    ("total", ("total_ms",), 1000, "s"),
    ("downtime", ("downtime_ms",), 1, "ms"),
    ("memory of the servers", ("resident_source_bytes", "resident_destination_bytes"), _GIB, "GiB"),
)
_MEMORY = {"resident_source_bytes": "source", "resident_destination_bytes": "destination"}


def is_of_sizes(summary: Mapping[str, Any]) -> bool:
    """Return whether one size, and nothing else, is what differs between the points."""
    return list(summary["sweep"]) in [[key] for key in _SIZES] and not summary["variants"]


def memory_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return for each point of a sweep over sizes what both sides' servers had resident, in words."""
    if not is_of_sizes(summary):
        return []
    return [
        f"{point['name']}: resident at most, "
        + ", ".join(f"{side} {_mib(point['metrics'][name]['max'])}" for name, side in _MEMORY.items())
        for point in summary["points"]
        if _MEMORY.keys() <= point["metrics"].keys()
    ]


def _mib(count: float) -> str:
    """Return a size in MiB: of GiB, what comes on top of the state would be rounded away."""
    return f"{count / (1 << 20):.0f} MiB"


def scale_figure(summary: Mapping[str, Any]) -> Figure | None:
    """Draw the medians over the size, each with the straight line that fits best (least squares).

    None where it is not a size that is swept, or memory was not measured.
    """
    points = [point for point in summary["points"] if _MEMORY.keys() <= point["metrics"].keys()]
    if not is_of_sizes(summary) or len(points) < 2:
        return None
    key = summary["sweep"][0]
    heading, unit = _SIZES[key]
    sizes = np.array([point["settings"][key] for point in points], dtype=float) / unit
    figure = Figure(figsize=(WIDTH_INCHES, 6.4), layout="constrained")
    for axes, (name, metrics, divisor, of) in zip(figure.subplots(3, 1, sharex=True), _PANELS, strict=True):
        for metric, colour in zip(metrics, (BLUE, ORANGE), strict=False):
            figures = [point["metrics"].get(metric) for point in points]
            known = np.array([one is not None for one in figures])
            values = np.array([one["p50"] for one in figures if one is not None], dtype=float) / divisor
            _draw(axes, sizes[known], values, colour, _MEMORY.get(metric, METRICS[metric].about))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        title(axes, name, of)
        axes.grid(lw=0.3)
        axes.tick_params(axis="x", labelbottom=True)
    axes.set_xlabel(f"{heading}; dots: median, lines: least squares", fontsize=8.5)
    legend(axes)
    return figure


def _draw(axes: Axes, sizes: Any, values: Any, colour: str, label: str) -> None:
    axes.plot(sizes, values, "o", color=colour, ms=4, label=label)
    if len(sizes) > 1:
        slope, start = np.polyfit(sizes, values, 1)
        ends = np.array([0.0, sizes.max()])
        axes.plot(ends, start + slope * ends, "-", color=colour, lw=0.8)
