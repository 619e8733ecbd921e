"""The load that the device makes by itself: what was asked for, what is reached."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.metrics.families import Metric

ASKED = Metric(
    "vfu_load_asked_bytes_per_second",
    "gauge",
    "Rate asked for at which the device writes its own memory; 0 without such a load.",
)
REACHED = Metric(
    "vfu_load_reached_bytes_per_second",
    "gauge",
    "Rate at which the device wrote its own memory in the last second. Below the rate "
    "asked for, the machine cannot keep up.",
)
MISSED = Metric(
    "vfu_load_missed_writes_total",
    "counter",
    "Due writes of that load for which there was no time. Any rise means that the load "
    "is lower than asked for.",
)

METRICS = (ASKED, REACHED, MISSED)


def collect(snapshot: Snapshot) -> Iterator[Family]:
    """Yield the families of this file."""
    device, load = snapshot.device, snapshot.load
    yield ASKED.one(device, load["asked_rate_bytes"])
    yield REACHED.one(device, load["reached_rate_bytes"])
    yield MISSED.one(device, load["missed_writes"])
