"""Faults that were injected: what goes wrong on purpose should never be taken for what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.metrics.families import Metric

INJECTED = Metric(
    "vfu_faults_injected_total",
    "counter",
    "Hits of armed faults, by operation (vfu-dev docs faults). A rise explains errors "
    "and delays at the same time; in production nobody arms faults.",
    ("op",),
)

METRICS = (INJECTED,)


def collect(snapshot: Snapshot) -> Iterator[Family]:
    """Yield the families of this file."""
    yield INJECTED.many(snapshot.device, [((op,), count) for op, count in snapshot.faults.items()])
