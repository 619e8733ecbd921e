"""QEMU's trace log (log backend) as data: what the VFIO migration code did and when."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

# Trace events that the lab enables; patterns as in QEMU's -trace option.
TRACE_PATTERNS = (
    "vfio_save_*",
    "vfio_load_*",
    "vfio_precopy_*",
    "vfio_state_pending_*",
    "vfio_migration_*",
    "vfio_vmstate_change*",
)

# `-msg timestamp=on` makes the log backend write `2026-01-02T03:04:05.678901Z event (device) text`.
_LINE = re.compile(r"^(?:(?P<time>\d{4}-\S+Z)\s+)?(?P<event>vfio_\w+)\s+(?P<text>.*)$")
_DEVICE = re.compile(r"^\((?P<device>[^)]*)\)\s*(?P<rest>.*)$")
_NUMBERS = {
    "vfio_save_iterate": re.compile(
        r"precopy initial size (?P<initial>\d+) precopy dirty size (?P<dirty>\d+)"
    ),
    "vfio_precopy_reinit": re.compile(
        r"precopy initial size (?P<initial>\d+) precopy dirty size (?P<dirty>\d+)"
    ),
    "vfio_state_pending_estimate": re.compile(
        r"precopy (?P<total>\d+) postcopy \d+ "
        r"precopy initial size (?P<initial>\d+) precopy dirty size (?P<dirty>\d+)"
    ),
    "vfio_state_pending_exact": re.compile(
        r"precopy (?P<total>\d+) postcopy \d+ stopcopy size (?P<stop_copy>\d+) "
        r"precopy initial size (?P<initial>\d+) precopy dirty size (?P<dirty>\d+)"
    ),
    "vfio_save_block": re.compile(r"data_size (?P<data_size>-?\d+)"),
}
_STATE = re.compile(r"new state (?P<state>\w+)")


@dataclass(frozen=True)
class TraceEvent:
    """One line of the log. `time`: unix seconds, None without a timestamp; `values`: its sizes in bytes."""

    time: float | None
    event: str
    device: str
    text: str
    values: dict[str, int] = field(default_factory=dict)
    state: str | None = None

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
        numbers = _NUMBERS[name].search(rest) if name in _NUMBERS else None
        state = _STATE.search(rest) if name == "vfio_migration_set_state" else None
        events.append(
            TraceEvent(
                time=datetime.fromisoformat(match["time"]).timestamp() if match["time"] else None,
                event=name,
                device=device["device"] if device else "",
                text=rest,
                values={key: int(value) for key, value in numbers.groupdict().items()} if numbers else {},
                state=state["state"] if state else None,
            )
        )
    return events


def states_set(events: list[TraceEvent], device: str | None = None) -> list[str]:
    """Return the states that QEMU asked for, in order, of one device or of all."""
    return [event.state for event in events if event.state and device in (None, event.device)]
