"""The switchover alone: the states of both sides after the devices stopped, in milliseconds."""

from __future__ import annotations

from typing import Any, NamedTuple

from matplotlib.figure import Figure

from vfu_dev.report.drawing import WIDTH_INCHES, title
from vfu_dev.report.plots import draw_state
from vfu_dev.report.timeline import Timeline

# Share of the part shown that lies before the stop and after the end; its least length in milliseconds.
MARGIN_SHARE, MARGIN_LEAST_MS = 0.15, 1.0
# A state gets its name inside the bar from this share of the width on.
NAMED_SHARE = 0.14


class Held(NamedTuple):
    """A state of a server: milliseconds since the stop, cut to the part that is shown.

    `begins` and `ends` say whether the state began and ended inside that part.
    """

    device: str
    side: str
    state: str
    start_ms: float
    duration_ms: float
    begins: bool
    ends: bool

    @property
    def start_text(self) -> str:
        """When the state began, as text."""
        return f"{self.start_ms:.1f}" if self.begins else "before"

    @property
    def duration_text(self) -> str:
        """Duration of the state as text; empty if it is not shown whole."""
        return f"{self.duration_ms:.1f}" if self.begins and self.ends else ""


def switchover(result: dict[str, Any]) -> list[Held]:
    """Return the states of the switchover in order; empty for a migration that was not completed.

    It begins when the first device leaves PRE_COPY (or RUNNING), and ends when the last one runs at the
    destination.
    """
    if result["qemu"]["status"] != "completed":
        return []
    timeline = Timeline(result)
    stops = [at for index in range(len(result["devices"])) if (at := timeline.stopped(index)) is not None]
    ends = [
        change["time"] - timeline.zero
        for device in result["devices"]
        for change in device.get("transitions_destination") or []
        if change["to"] == "RUNNING"
    ]
    if not stops or not ends or max(ends) <= min(stops):
        return []
    zero, end = min(stops), max(ends)
    margin = max((end - zero) * MARGIN_SHARE, MARGIN_LEAST_MS / 1000)
    held = []
    for device in result["devices"]:
        for side in ("source", "destination"):
            for span in timeline.spans(device.get(f"transitions_{side}") or []):
                start, until = max(span.start, zero - margin), min(span.end, end + margin)
                if until > start:
                    whole = span.start >= zero - margin, span.end <= end + margin
                    times = (start - zero) * 1000, (until - start) * 1000
                    held.append(Held(device["name"], side, span.state, *times, *whole))
    return held


def switchover_figure(result: dict[str, Any]) -> Figure | None:
    """Draw a bar for each side of each device; None where there was no switchover."""
    held = switchover(result)
    if not held:
        return None
    rows = list(dict.fromkeys((one.device, one.side) for one in held))
    figure = Figure(figsize=(WIDTH_INCHES, 1.0 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    first = min(one.start_ms for one in held)
    last = max(one.start_ms + one.duration_ms for one in held)
    for one in held:
        row, named = rows.index((one.device, one.side)), one.duration_ms > (last - first) * NAMED_SHARE
        draw_state(axes, row, one.start_ms, one.duration_ms, one.state, named)
    axes.axvline(0, color="black", lw=0.9, ls="--")
    title(axes, "Device states around the stop (dashed)")
    axes.set_yticks(range(len(rows)), [" ".join(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(first, last)
    axes.set_xlabel("milliseconds since the first device stopped", fontsize=8.5)
    axes.grid(axis="x", lw=0.3)
    return figure
