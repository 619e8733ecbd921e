"""The data sent: bytes and pages of each pass, and bytes of each phase."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vfu_dev.report.drawing import BLUE, MIB, ORANGE, RED, WIDTH_INCHES, legend, title
from vfu_dev.sizes import format_size

# Up to this number of bars, each has room for its figure.
LABELLED_PASSES = 8
PHASES = {
    "initial": (BLUE, "pre-copy, initial data"),
    "dirty": (ORANGE, "pre-copy, dirty data"),
    "stop_copy": (RED, "stop-copy"),
}


def pass_list(device: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the passes that the source's server reported; a result of an older version has none."""
    return (device.get("save") or {}).get("pass_list") or []


def _told(value: float, key: str) -> str:
    return format_size(value) if key == "stream_bytes" else f"{value:.0f}"


def passes_figure(result: dict[str, Any]) -> Figure | None:
    """Draw a bar for each pass of each device, bytes on the left, pages on the right; None without passes."""
    devices = [device for device in result["devices"] if pass_list(device)]
    if not devices:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 0.4 + 2.0 * len(devices)), layout="constrained")
    for row, device in enumerate(devices):
        passes = pass_list(device)
        first = max(0, device["passes"] - len(passes)) + 1
        for column, (key, unit, factor) in enumerate((("stream_bytes", "MiB", MIB), ("pages", "pages", 1))):
            axes = figure.add_subplot(len(devices), 2, 2 * row + column + 1)
            for phase, (colour, label) in PHASES.items():
                bars = [
                    (first + i, entry[key] / factor)
                    for i, entry in enumerate(passes)
                    if entry["phase"] == phase
                ]
                if bars:
                    numbers, values = zip(*bars, strict=True)
                    drawn = axes.bar(numbers, values, color=colour, label=label, width=0.8)
                    if len(passes) <= LABELLED_PASSES:
                        texts = [_told(value * factor, key) for value in values]
                        axes.bar_label(drawn, texts, fontsize=7, padding=1.5)
            name = "Bytes" if column == 0 else "Pages"
            title(axes, f"{name} of each pass, {device['name']}", unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(first - 0.6, first + len(passes) - 0.4)
            axes.margins(y=0.12)
            axes.set_xlabel(
                "pass" if first == 1 else f"pass (the first {first - 1} are not kept)", fontsize=8.5
            )
            if column == 1:
                legend(axes)
    return figure


def phases_figure(result: dict[str, Any]) -> Figure | None:
    """Draw the stream bytes that each device sent in pre-copy and in stop-copy; None without devices."""
    devices = result["devices"]
    if not devices:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 1.0 + 0.35 * len(devices)), layout="constrained")
    axes = figure.subplots()
    names = [device["name"] for device in devices]
    before = [device["precopy_bytes"] / MIB for device in devices]
    after = [device["stop_copy_bytes"] / MIB for device in devices]
    axes.barh(names, before, color=BLUE, label="pre-copy (device running)")
    axes.barh(names, after, left=before, color=RED, label="stop-copy (device stopped)")
    for height, device in enumerate(devices):
        label = "size of the device's\nmemory" if height == 0 else None
        at = [device["size_bytes"] / MIB] * 2
        axes.plot(at, [height - 0.45, height + 0.45], color="black", lw=1.5, label=label)
    title(axes, "Stream bytes by phase")
    axes.set_xlabel("MiB", fontsize=8.5)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    legend(axes)
    return figure
