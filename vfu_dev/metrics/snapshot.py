"""Everything the metrics show, as plain values: made by the thread that owns the device, read by any."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from vfu_dev.migration.totals import Totals

REFUSAL_REASONS = ("bounds", "state")


@dataclass
class Snapshot:
    """One device and its server at one moment.

    Attributes:
        states: every state the device can be in, by the kernel's names.
        transitions: (from, to, count) for every arc there is.
        scans: `looks`, `pages`, `seconds`, over all memories.
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
    scans: dict[str, float]
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
