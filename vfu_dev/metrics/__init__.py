"""Metrics of one device server: read at scrape time from the server's own counters.

`figures` is what the device's thread hands over, `DeviceCollector` turns it into Prometheus' families, and
`ALL_METRICS` is the list of them that documents and tests rely on.
"""

from vfu_dev.metrics.collector import ALL_METRICS, DeviceCollector, device_registry
from vfu_dev.metrics.families import DEVICE_LABEL, PREFIX, Metric

__all__ = [
    "ALL_METRICS",
    "DEVICE_LABEL",
    "PREFIX",
    "DeviceCollector",
    "Metric",
    "device_registry",
]
