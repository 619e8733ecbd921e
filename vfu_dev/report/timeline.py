"""The JSON of a migration as series that can be drawn: times in seconds since the migration began."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# How long after the last interesting instant the axis goes on.
TAIL_SECONDS = 0.3


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
        """Append a point; nothing happens for a value that is not known."""
        if isinstance(value, int | float):
            self.times.append(time)
            self.values.append(float(value))


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
        self.end = max([last, *arrivals]) - self.zero + TAIL_SECONDS

    def spans(self, transitions: list[dict[str, Any]]) -> list[Span]:
        """Return what a server's transitions say, cut to the axis."""
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

    def trace(self, event: str, key: str, index: int) -> Series:
        """Return a size from the source's trace events `event` of device `index`."""
        events = [e for e in self.result["qemu"]["trace_source"] if e.get("event") == event and "time" in e]
        names = sorted({e.get("device", "") for e in events})
        series = Series()
        for entry in events:
            if index < len(names) and entry.get("device", "") == names[index]:
                series.add(entry["time"] - self.zero, entry.get("values", {}).get(key))
        return series

    def threshold_bytes(self) -> float | None:
        """Return below what QEMU switches over: bandwidth times downtime limit (migration/migration.c)."""
        parameters = self.result["qemu"].get("parameters", {})
        bandwidth = parameters.get("avail_switchover_bandwidth") or parameters.get("max_bandwidth")
        limit = self.result["qemu"].get("downtime_limit_ms")
        return bandwidth * limit / 1000 if bandwidth and limit else None
