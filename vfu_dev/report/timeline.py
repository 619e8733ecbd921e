"""The JSON of a migration as series that can be drawn: times in seconds since the migration began."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vfu_dev.qemu_events import Kind, kind_of

# The axis extends beyond the last event by this share of its length.
TAIL_SHARE = 0.02
# Points drawn of a curve: more than pixels, but few enough for a small page.
POINTS = 600


@dataclass(frozen=True)
class Span:
    """A state held from `start` to `end` (seconds)."""

    state: str
    start: float
    end: float


@dataclass
class Series:
    """Points of one curve."""

    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, time: float, value: Any) -> None:
        """Append a point; an unknown value is ignored."""
        if isinstance(value, int | float):
            self.times.append(time)
            self.values.append(float(value))

    def thin(self, limit: int = POINTS) -> Series:
        """Return at most about `limit` points: of each stretch of the curve its lowest and its highest."""
        count = len(self.times)
        if count <= limit:
            return self
        kept: set[int] = {0, count - 1}
        stretches = limit // 2
        for number in range(stretches):
            stretch = range(number * count // stretches, (number + 1) * count // stretches)
            kept |= {min(stretch, key=self.values.__getitem__), max(stretch, key=self.values.__getitem__)}
        order = sorted(kept)
        return Series([self.times[i] for i in order], [self.values[i] for i in order])


class Timeline:
    """Axis and curves of one result."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.samples: list[dict[str, Any]] = result.get("samples") or []
        self.zero = self.samples[0]["time"] if self.samples else float(result.get("started") or 0)
        last = self.samples[-1]["time"] if self.samples else float(result.get("ended") or 0)
        # The destination turns RUNNING after the source's QEMU has said "completed".
        arrivals = [
            change["time"]
            for device in result.get("devices", [])
            for change in device.get("transitions_destination", [])
        ]
        self.end = max(0.1, (max([last, *arrivals]) - self.zero) * (1 + TAIL_SHARE))

    def spans(self, transitions: list[dict[str, Any]]) -> list[Span]:
        """Return the states of a server's transitions, cut to the axis."""
        spans = []
        start, state = 0.0, transitions[0]["from"] if transitions else "RUNNING"
        for change in transitions:
            at = change["time"] - self.zero
            if at > start:
                spans.append(Span(state, start, min(at, self.end)))
            start, state = max(at, 0.0), change["to"]
        if self.end > start:
            spans.append(Span(state, start, self.end))
        return spans

    def stopped(self, index: int) -> float | None:
        """Return when the source's device last began to stop, None when it never did."""
        for change in reversed(self.result["devices"][index].get("transitions_source") or []):
            if change["from"] in ("PRE_COPY", "RUNNING") and change["to"] not in ("PRE_COPY", "RUNNING"):
                return float(change["time"]) - self.zero
        return None

    def sampled(self, index: int, key: str, factor: float = 1.0) -> Series:
        """Return a figure that the source's server sampled of device `index`, multiplied by `factor`."""
        table = self.result["devices"][index].get("samples_source") or {"fields": [], "rows": []}
        series = Series()
        if key in table["fields"]:
            time_at, value_at = table["fields"].index("time"), table["fields"].index(key)
            for row in table["rows"]:
                value = row[value_at]
                series.add(row[time_at] - self.zero, None if value is None else value * factor)
        return series

    def downtime_limits(self) -> Series:
        """Return QEMU's downtime limit in milliseconds: as it was set, and as the policy changed it."""
        last = float(self.result["qemu"]["downtime_limit_ms"])
        series = Series([0.0], [float((self.result.get("settings") or {}).get("downtime_limit_ms", last))])
        for step in self.result.get("policy") or []:
            series.add(step["time"] - self.zero, step["parameters"].get("downtime-limit"))
        series.add(self.end, last)
        return series

    def row(self, key: str) -> Series:
        """Return a figure of the lab's samples."""
        series = Series()
        for row in self.samples:
            series.add(row["time"] - self.zero, row.get(key))
        return series

    def server(self, side: str, index: int, key: str) -> Series:
        """Return a figure of one server's status over time."""
        series = Series()
        for row in self.samples:
            devices = row.get(side) or []
            if index < len(devices):
                series.add(row["time"] - self.zero, devices[index].get(key))
        return series

    def qemu(self, *path: str) -> Series:
        """Return a figure of `query-migrate` over time, by its path (`ram`, `remaining`)."""
        series = Series()
        for row in self.samples:
            value: Any = row.get("qemu") or {}
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            series.add(row["time"] - self.zero, value)
        return series

    def trace(self, kind: Kind, key: str, index: int) -> Series:
        """Return a size from the source's trace events of `kind` of device `index`."""
        events = [e for e in self.result["qemu"]["trace_source"] if kind_of(e) == kind and "time" in e]
        names = sorted({e.get("device", "") for e in events})
        series = Series()
        for entry in events:
            if index < len(names) and entry.get("device", "") == names[index]:
                series.add(entry["time"] - self.zero, entry.get("values", {}).get(key))
        return series
