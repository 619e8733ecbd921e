"""MMIO: what the guest reads and writes, and how long it waits for it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from vfu_dev.figures.snapshot import REFUSAL_REASONS, Snapshot
from vfu_dev.metrics.families import Metric

READS = Metric(
    "vfu_region_reads_total", "counter", "Reads of BARs that were served. It rises with the guest's load."
)
WRITES = Metric(
    "vfu_region_writes_total",
    "counter",
    "Writes to BARs that were served. It rises with the guest's load; during a pre-copy each may dirty a "
    "page.",
)
READ_BYTES = Metric("vfu_region_read_bytes_total", "counter", "Bytes read from BARs.")
WRITTEN_BYTES = Metric(
    "vfu_region_written_bytes_total",
    "counter",
    "Bytes written to BARs. Compared with the dirty rate it shows how many writes hit "
    "pages that are dirty already.",
)
REFUSED = Metric(
    "vfu_region_accesses_refused_total",
    "counter",
    "BAR accesses refused: bounds = outside the BAR, a broken or hostile client; "
    "state = a write while the device must not change, a client that did not stop the guest.",
    ("reason",),
)
READ_SECONDS = Metric(
    "vfu_region_read_duration_seconds",
    "histogram",
    "Time in the device for one read of a BAR; without the way through socket and library. "
    "A rise means a slow device or a busy machine.",
)
WRITE_SECONDS = Metric(
    "vfu_region_write_duration_seconds",
    "histogram",
    "Time in the device for one write to a BAR; without the way through socket and library. "
    "A rise means a slow device or a busy machine.",
)

METRICS = (READS, WRITES, READ_BYTES, WRITTEN_BYTES, REFUSED, READ_SECONDS, WRITE_SECONDS)


def collect(snapshot: Snapshot) -> Iterator[Family]:
    """Yield the families of this file."""
    device, counters = snapshot.device, snapshot.counters
    yield READS.one(device, counters["region_reads"])
    yield WRITES.one(device, counters["region_writes"])
    yield READ_BYTES.one(device, counters["region_read_bytes"])
    yield WRITTEN_BYTES.one(device, counters["region_written_bytes"])
    yield REFUSED.many(device, [((reason,), snapshot.refused[reason]) for reason in REFUSAL_REASONS])
    yield READ_SECONDS.one(device, snapshot.histograms["region_read"])
    yield WRITE_SECONDS.one(device, snapshot.histograms["region_write"])
