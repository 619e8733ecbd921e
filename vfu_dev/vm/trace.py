"""QEMU's trace log (log backend) as data: what the VFIO migration code did and when."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vfu_dev.qemu_events import Kind, read
from vfu_dev.qemu_trace import split_line


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
        found = split_line(line)
        if found is None:
            continue
        kind, values = read(found.event, found.text)
        state = values.pop("state", None)
        events.append(
            TraceEvent(
                time=found.time,
                event=found.event,
                device=found.device,
                text=found.text,
                values={key: int(value) for key, value in values.items()},
                state=state if kind is Kind.STATE else None,
                kind=kind,
            )
        )
    return events


def states_set(events: list[TraceEvent], device: str | None = None) -> list[str]:
    """Return the states that QEMU asked for, in order, of one device or of all."""
    return [event.state for event in events if event.state and device in (None, event.device)]
