"""Everything the metrics show, as plain values: made by the thread that owns the device, read by any."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

# Why an outgoing migration ended. `failed`: an error here, or an audit that found a write nobody tracked.
SAVE_RESULTS = ("completed", "cancelled", "reset", "disconnected", "failed")
# Why an incoming one did. `refused`: the stream was damaged, foreign or cut off.
LOAD_RESULTS = ("completed", "refused", "reset", "disconnected", "failed")
SENT_PHASES = ("pre_copy_initial", "pre_copy_dirty", "stop_copy")
REFUSAL_REASONS = ("bounds", "state")


def _zeros(names: tuple[str, ...]) -> Callable[[], dict[str, int]]:
    return lambda: dict.fromkeys(names, 0)


@dataclass
class Totals:
    """What migrations counted since the server started."""

    saves_started: int = 0
    saves: dict[str, int] = field(default_factory=_zeros(SAVE_RESULTS))
    loads_started: int = 0
    loads: dict[str, int] = field(default_factory=_zeros(LOAD_RESULTS))
    sent_bytes: dict[str, int] = field(default_factory=_zeros(SENT_PHASES))
    received_bytes: int = 0
    passes: int = 0
    pages_sent: int = 0
    pages_resent: int = 0
    zero_pages: int = 0
    scans: int = 0
    scanned_pages: int = 0
    scan_seconds: float = 0.0


@dataclass
class Snapshot:
    """One device and its server at one moment.

    Attributes:
        states: every state the device can be in, by the kernel's names.
        transitions: (from, to, count) for every arc there is.
        histograms: by name, each as `Histogram.as_dict` gives it.
        forecast: `Forecast` as a dict; its values are None where there is nothing to say.
        last_*: of the most recent outgoing migration that was completed, None before the first.
        snapshot_seconds: what making the snapshot before this one cost the device's thread.
    """

    device: str
    build: dict[str, str]
    library: dict[str, str]
    identity: dict[str, str]
    states: list[str]
    state: str
    state_entered: float
    connected: bool
    counters: dict[str, int]
    refused: dict[str, int]
    memories: list[dict[str, Any]]
    transitions: list[tuple[str, str, int]]
    totals: Totals
    histograms: dict[str, dict[str, Any]]
    forecast: dict[str, Any]
    last_stop_copy_seconds: float | None = None
    last_downtime_seconds: float | None = None
    last_predicted_downtime_seconds: float | None = None
    snapshot_seconds: float = 0.0

    def to_json(self) -> bytes:
        """Return one line without its end."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, line: bytes) -> Snapshot:
        """Return what `to_json` was given."""
        values = json.loads(line)
        values["totals"] = Totals(**values["totals"])
        values["transitions"] = [tuple(entry) for entry in values["transitions"]]
        return cls(**values)
