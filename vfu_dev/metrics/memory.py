"""Memories: the device's own, and the guest's as far as the device reaches it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.metrics.families import Metric

SIZE = Metric("vfu_memory_size_bytes", "gauge", "Size of a device memory; it does not change.", ("memory",))
PAGE_SIZE = Metric(
    "vfu_memory_page_size_bytes",
    "gauge",
    "Unit of dirty tracking: one byte written makes one unit dirty.",
    ("memory",),
)
WRITTEN = Metric(
    "vfu_memory_written_bytes",
    "gauge",
    "Bytes in pages that were ever written: what a migration has to send. It falls when "
    "the memory is set up anew.",
    ("memory",),
)
DMA_READ = Metric(
    "vfu_dma_read_bytes_total", "counter", "Bytes the device read from guest memory. It rises with the load."
)
DMA_WRITTEN = Metric(
    "vfu_dma_written_bytes_total",
    "counter",
    "Bytes the device wrote to guest memory; each dirties guest pages that the VM has to migrate.",
)
DMA_ERRORS = Metric(
    "vfu_dma_errors_total",
    "counter",
    "DMA that failed: not mapped, no permission, or the client gone. Any rise means a broken driver or "
    "IOMMU set-up.",
)

METRICS = (SIZE, PAGE_SIZE, WRITTEN, DMA_READ, DMA_WRITTEN, DMA_ERRORS)


def collect(snapshot: Snapshot) -> Iterator[Family]:
    """Yield the families of this file."""
    device, counters = snapshot.device, snapshot.counters
    for metric, key in ((SIZE, "size_bytes"), (PAGE_SIZE, "page_size_bytes"), (WRITTEN, "written_bytes")):
        yield metric.many(device, [((memory["name"],), memory[key]) for memory in snapshot.memories])
    yield DMA_READ.one(device, counters["dma_read_bytes"])
    yield DMA_WRITTEN.one(device, counters["dma_written_bytes"])
    yield DMA_ERRORS.one(device, counters["dma_errors"])
