"""Pictures of many moves: the distribution of downtime, over time, and by the swept key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vfu_dev.errors import ConfigError
from vfu_dev.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    WIDTH_INCHES,
    legend,
    title,
)
from vfu_dev.series.rows import METRICS, Row, values_of
from vfu_dev.sizes import parse_size
from vfu_dev.workload import parse_dirty_rate

COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY, BLACK)
# More names than this do not fit beside an axis; the table has all of them.
MOST_POINTS = 40
# A logarithmic axis shows both where the largest is that much larger.
LOGARITHMIC = 20
SCATTER_SEED = 1


def _by_point(summary: Mapping[str, Any], rows: Sequence[Row], metric: str) -> dict[str, list[float]]:
    found = {
        point["name"]: values_of((row for row in rows if row.point == point["name"]), metric)
        for point in summary["points"][:MOST_POINTS]
    }
    return {name: values for name, values in found.items() if values}


def _colour_of(summary: Mapping[str, Any], name: str) -> str:
    variants = summary["variants"]
    variant = next(point["variant"] for point in summary["points"] if point["name"] == name)
    return COLOURS[variants.index(variant) % len(COLOURS)] if variant in variants else BLUE


def _strip(axes: Axes, height: float, values: Sequence[float], colour: str) -> None:
    """Draw each value as a dot, and the 25th, 50th and 95th percentile as bars."""
    random = np.random.default_rng(SCATTER_SEED)
    axes.plot(values, height + random.uniform(-0.22, 0.22, len(values)), ".", color=colour, ms=4, alpha=0.45)
    for percentile, width, style in ((25, 1.2, "-"), (50, 2.4, "-"), (95, 1.2, ":")):
        at = float(np.percentile(values, percentile))
        axes.plot([at, at], [height - 0.36, height + 0.36], style, color=BLACK, lw=width)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    known = [value for value in values if value > 0]
    if known and max(known) / min(known) > LOGARITHMIC:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)


def downtime_figure(summary: Mapping[str, Any], rows: Sequence[Row]) -> Figure | None:
    """Draw each move's downtime and total time, point by point; None when no move was completed."""
    found = _by_point(summary, rows, "downtime_ms")
    if not found:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.42 * len(found)), layout="constrained")
    for axes, metric, words in zip(
        figure.subplots(1, 2, sharey=True),
        ("downtime_ms", "total_ms"),
        ("Downtime", "Total time"),
        strict=True,
    ):
        values = _by_point(summary, rows, metric)
        for height, name in enumerate(found):
            if name in values:
                _strip(axes, height, values[name], _colour_of(summary, name))
        _scale(axes, [value for one in values.values() for value in one])
        title(axes, words)
        axes.set_xlabel("ms; bars: 25th and 50th percentile, dotted: 95th", fontsize=8)
        axes.grid(axis="x", lw=0.3)
    axes.set_yticks(range(len(found)), [f"{name} (n={len(one)})" for name, one in found.items()], fontsize=8)
    axes.invert_yaxis()
    return figure


def course_figure(summary: Mapping[str, Any], rows: Sequence[Row]) -> Figure | None:
    """Draw downtime over the moves: it shows drifts and disturbances."""
    found = _by_point(summary, rows, "downtime_ms")
    if not found or max(len(values) for values in found.values()) < 2:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 2.8), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(found):
        points = [row for row in rows if row.point == name and "downtime_ms" in row.metrics]
        numbers = [row.move for row in points]
        values = [row.metrics["downtime_ms"] for row in points]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(numbers, values, ".-", color=colour, lw=0.8, ms=3, label=name)
    values = [value for one in found.values() for value in one]
    if min(values) > 0 and max(values) / min(values) > LOGARITHMIC:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    title(axes, "Downtime, move by move", "ms")
    axes.set_xlabel("move", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", lw=0.3)
    if len(found) <= 16:
        legend(axes)
    return figure


def _number(value: Any) -> float | None:
    """Return a swept value as a number for an axis; None for a word."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(next(iter(parse_dirty_rate(value).values())))
    except ConfigError:
        pass
    try:
        return float(parse_size(str(value)))
    except ValueError:
        return None


def sweep_figure(summary: Mapping[str, Any]) -> Figure | None:
    """Draw the median, and the band from 25th to 95th percentile, over the first swept key.

    Each combination of the other swept keys and variants is a line. None if no number is swept.
    """
    if not summary["sweep"]:
        return None
    key = summary["sweep"][0]
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for point in summary["points"]:
        at = _number(point["sweep"][key])
        if at is None:
            return None
        others = [f"{name.rpartition('.')[2]}={v}" for name, v in point["sweep"].items() if name != key]
        lines.setdefault(" ".join([point["variant"] or "", *others]).strip(), []).append(
            (at, point["metrics"])
        )
    figure = Figure(figsize=(WIDTH_INCHES, 5.6), layout="constrained")
    for axes, metric in zip(
        figure.subplots(3, 1, sharex=True), ("downtime_ms", "total_ms", "passes"), strict=True
    ):
        for number, (name, points) in enumerate(lines.items()):
            known = [(at, found[metric]) for at, found in points if metric in found]
            known.sort(key=lambda pair: pair[0])
            if not known:
                continue
            colour = COLOURS[number % len(COLOURS)]
            places = [at for at, _ in known]
            axes.plot(places, [one["p50"] for _, one in known], ".-", color=colour, label=name or "median")
            low, high = [one["p25"] for _, one in known], [one["p95"] for _, one in known]
            axes.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)
        axes.set_ylim(bottom=0)
        title(axes, metric.removesuffix("_ms"), METRICS[metric].unit)
        axes.grid(lw=0.3)
        axes.tick_params(axis="x", labelbottom=True)
    axes.set_xlabel(f"{key}; lines: median, bands: 25th to 95th percentile", fontsize=8.5)
    if len(lines) > 1:
        legend(figure.axes[0])
    return figure


def comparison_figure(found: Mapping[str, Any], first: Sequence[Row], second: Sequence[Row]) -> Figure:
    """Draw the downtimes of two results, one above the other, for each point that both have."""
    names = [entry["point"] for entry in found["entries"] if entry["metric"] == "downtime_ms"][:MOST_POINTS]
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.8 * max(1, len(names))), layout="constrained")
    axes = figure.subplots()
    labels, everything = [], []
    for number, name in enumerate(names):
        mine, _, other = name.partition(" / ")
        for offset, rows, point, colour, side in (
            (0, first, mine, BLUE, "first"),
            (1, second, other or mine, RED, "second"),
        ):
            values = values_of((row for row in rows if row.point == point), "downtime_ms")
            everything += values
            labels.append(f"{point}, {side} (n={len(values)})")
            _strip(axes, 2 * number + offset, values, colour)
    _scale(axes, everything)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    title(axes, "Downtime")
    axes.set_xlabel("ms; bars: 25th and 50th percentile, dotted: 95th", fontsize=8.5)
    axes.grid(axis="x", lw=0.3)
    return figure
