"""QEMU's trace log (log backend) as data: what the VFIO migration code did and when."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vfu_dev.qemu_events import Kind, read

# `-msg timestamp=on` makes the log backend write `2026-01-02T03:04:05.678901Z event (device) text`, and QEMU
# 10.0 `PID@1767323045.678901:event  (device) text`.
_LINE = re.compile(
    r"^(?:(?P<time>\d{4}-\S+Z)\s+|\d+@(?P<seconds>\d+\.\d+):)?(?P<event>vfio_\w+)\s+(?P<text>.*)$"
)
_DEVICE = re.compile(r"^\((?P<device>[^)]*)\)\s*(?P<rest>.*)$")


@dataclass(frozen=True)
class TraceEvent:
    """One line of the log.

    Attributes:
        time: unix seconds, None without a timestamp.
        kind: what it tells, the same in all versions (`qemu_events.Kind`); None for all other events.
        values: its numbers; sizes are bytes.
        state: that QEMU asked for, of Kind.STATE.
    """

    time: float | None
    event: str
    device: str
    text: str
    values: dict[str, int] = field(default_factory=dict)
    state: str | None = None
    kind: Kind | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object without empty members."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


def parse_trace(path: Path) -> list[TraceEvent]:
    """Return the VFIO events of a trace log in order; a missing file has none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        name, text = match["event"], match["text"].strip()
        device = _DEVICE.match(text)
        rest = device["rest"] if device else text
        kind, values = read(name, rest)
        state = values.pop("state", None)
        events.append(
            TraceEvent(
                time=_time(match),
                event=name,
                device=device["device"] if device else "",
                text=rest,
                values={key: int(value) for key, value in values.items()},
                state=state if kind is Kind.STATE else None,
                kind=kind,
            )
        )
    return events


def _time(match: re.Match[str]) -> float | None:
    if match["time"]:
        return datetime.fromisoformat(match["time"]).timestamp()
    return float(match["seconds"]) if match["seconds"] else None


def states_set(events: list[TraceEvent], device: str | None = None) -> list[str]:
    """Return the states that QEMU asked for, in order, of one device or of all."""
    return [event.state for event in events if event.state and device in (None, event.device)]
