"""Everything the metrics show, as plain values: made by the thread that owns the device, read by any."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vfu_dev import JSON_VERSION
from vfu_dev.figures.totals import Totals

REFUSAL_REASONS = ("bounds", "state")


class Sample(NamedTuple):
    """A migration at one moment of its course; what is not known is None. Bytes are of the stream."""

    time: float  # Unix time
    state: str
    initial_bytes: int | None
    dirty_bytes: int | None
    stop_copy_length_bytes: int | None
    transferred_bytes: int  # sent since PRE_COPY or STOP_COPY began, or received since RESUMING did
    dirty_rate_bytes_per_second: float | None
    transfer_rate_bytes_per_second: float | None
    predicted_downtime_seconds: float | None
    passes: int


@dataclass
class Snapshot:
    """One device and its server at one moment.

    Attributes:
        states: every state the device can be in, by the kernel's names.
        transitions: (from, to, count) for every arc there is.
        load: what the device writes by itself: `asked_rate_bytes`, `reached_rate_bytes` in the last second,
            `missed_writes` since it is served.
        scans: `count`, `pages`, `seconds`, over all memories.
        histograms: by name, each as `Histogram.as_dict` gives it.
        forecast: `Forecast` as a dict; its values are None where there is nothing to say.
        faults: how often injected ones happened, by operation.
        save: `precopy_bytes`, `stop_copy_bytes` and `passes` of the most recent outgoing migration so far.
        received_bytes: stream bytes of the most recent incoming migration so far.
        last_*: of the most recent outgoing migration that went on to STOP, None before the first.
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
    load: dict[str, float]
    transitions: list[tuple[str, str, int]]
    totals: Totals
    scans: dict[str, float]
    histograms: dict[str, dict[str, Any]]
    forecast: dict[str, Any]
    faults: dict[str, int]
    save: dict[str, int] | None = None
    received_bytes: int | None = None
    last_stop_copy_seconds: float | None = None
    last_downtime_seconds: float | None = None
    last_predicted_downtime_seconds: float | None = None
    snapshot_seconds: float = 0.0


@dataclass
class Figures:
    """A snapshot, and the samples that came since the reader last asked.

    Attributes:
        sequence: number of the last sample in `samples`; ask for what comes after it next time. One lower
            than what was asked for means that another server answers now.
        more: whether further samples wait already.
    """

    snapshot: Snapshot
    sequence: int
    more: bool
    samples: list[Sample]

    def to_json(self) -> bytes:
        """Return one line without its end."""
        return json.dumps(self.as_dict()).encode()

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON knows it, field names of the samples once."""
        return {
            "version": JSON_VERSION,
            "snapshot": asdict(self.snapshot),
            "sequence": self.sequence,
            "more": self.more,
            "samples": {"fields": Sample._fields, "rows": self.samples},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Figures:
        """Return what `as_dict` was given.

        Raises: TypeError, KeyError, ValueError: it is something else.
        """
        snapshot = dict(values["snapshot"])
        snapshot["totals"] = Totals(**snapshot["totals"])
        snapshot["transitions"] = [tuple(entry) for entry in snapshot["transitions"]]
        fields, rows = values["samples"]["fields"], values["samples"]["rows"]
        samples = [Sample(**dict(zip(fields, row, strict=True))) for row in rows]
        return cls(Snapshot(**snapshot), values["sequence"], values["more"], samples)
