"""Pictures of the model beside measurements: the convergence map, and prediction against measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vfu_dev.errors import ConfigError
from vfu_dev.model.link import qemu_bandwidth, qemu_link
from vfu_dev.model.predict import border_rate
from vfu_dev.report.drawing import BLACK, BLUE, GREEN, GREY, MIB, ORANGE, PINK, RED, SKY, title
from vfu_dev.series.prediction import Compared
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES

_COLOURS = {"uniform": BLUE, "sequential": ORANGE, "hotset": RED, "zipf": GREEN, "idle": GREY}


def map_figure(cells: Sequence[Compared]) -> Figure:
    """Return the convergence map: each cell a move, the model's border across.

    Raises: ConfigError: the cells are not uniform loads on one memory at several bandwidths.
    """
    memories = {cell.settings["device.memory"] for cell in cells}
    limits = {cell.settings["qemu.downtime-limit"] for cell in cells}
    if len(memories) != 1 or len(limits) != 1 or {cell.load.pattern for cell in cells} != {"uniform"}:
        raise ConfigError("a map needs uniform loads on one memory with one downtime limit")
    memory, limit = memories.pop(), limits.pop()
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    axes = figure.subplots()
    kinds = (
        (True, True, GREEN, "o", "converged, as the model says"),
        (False, False, RED, "X", "did not, as the model says"),
        (True, False, GREEN, "D", "converged, the model says it does not"),
        (False, True, RED, "s", "did not, the model says it does"),
    )
    for converged, predicted, colour, mark, label in kinds:
        found = [
            cell
            for cell in cells
            if (cell.converged > 0.5) == converged and cell.prediction.converges == predicted
        ]
        if found:
            axes.plot(
                [cell.link.bandwidth / MIB for cell in found],
                [cell.load.page_rate * DEFAULT_PAGE_BYTES / MIB for cell in found],
                mark,
                color=colour,
                ms=9,
                mec=BLACK if converged != predicted else colour,
                label=label,
            )
    low, high = (choose(cell.link.bandwidth for cell in cells) for choose in (min, max))
    bandwidths = np.geomspace(low / 1.15, high * 1.15, 200)
    link = qemu_link(MIB, downtime_limit_seconds=limit / 1000)
    borders = [border_rate(memory, replace(link, bandwidth=bandwidth)) for bandwidth in bandwidths]
    axes.plot(bandwidths / MIB, np.array(borders) / MIB, "-", color=BLACK, lw=1.5, label="the model's border")
    axes.plot(bandwidths / MIB, bandwidths / MIB, "--", color=GREY, lw=1, label="dirty rate equals bandwidth")
    top = max(cell.load.page_rate * DEFAULT_PAGE_BYTES / MIB for cell in cells)
    axes.set(xscale="log", yscale="log", xlabel="bandwidth reached, MiB/s", ylim=(None, top * 1.6))
    for axis, values in (
        (axes.xaxis, sorted({qemu_bandwidth(cell.settings["qemu.max-bandwidth"]) / MIB for cell in cells})),
        (axes.yaxis, sorted({cell.load.page_rate * DEFAULT_PAGE_BYTES / MIB for cell in cells})),
    ):
        axis.set_ticks(values, labels=[f"{value:g}" for value in values], minor=False)
        axis.set_ticks([], minor=True)
    title(axes, f"{memory // MIB} MiB, uniform writes, downtime limit {limit} ms", "pages written, MiB/s")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False)
    return figure


def against_figure(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Return predicted against measured time, bytes and passes.

    Args: rows: `pattern`, and for each of `seconds`, `bytes`, `passes` a pair (predicted, measured).
    """
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    columns = figure.subplots(1, 3)
    kinds = (("seconds", 1.0, "time, s"), ("bytes", MIB, "stream, MiB"), ("passes", 1.0, "passes"))
    for axes, (name, unit, text) in zip(columns, kinds, strict=True):
        _scatter(axes, rows, name, unit)
        title(axes, text, "measured" if axes is columns[0] else "")
    columns[0].legend(fontsize=7.5)
    return figure


def _scatter(axes: Axes, rows: Sequence[Mapping[str, object]], name: str, unit: float) -> None:
    values: list[float] = []
    for pattern in dict.fromkeys(str(row["pattern"]) for row in rows):
        pairs = np.array([row[name] for row in rows if row["pattern"] == pattern], dtype=float) / unit
        axes.plot(pairs[:, 0], pairs[:, 1], "o", ms=4.5, color=_COLOURS.get(pattern, PINK), label=pattern)
        values += pairs.ravel().tolist()
    low, high = min(values) / 1.2, max(values) * 1.2
    axes.plot([low, high], [low, high], "-", color=GREY, lw=0.8)
    axes.fill_between([low, high], [low / 1.2, high / 1.2], [low * 1.2, high * 1.2], color=SKY, alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="predicted", xlim=(low, high), ylim=(low, high))
    round_numbers = [value for power in range(4) for value in (10**power, 2 * 10**power, 5 * 10**power)]
    for axis in (axes.xaxis, axes.yaxis):
        shown = [value for value in round_numbers if low <= value <= high]
        axis.set_ticks(shown, labels=[str(value) for value in shown], minor=False)
        axis.set_ticks([], minor=True)
