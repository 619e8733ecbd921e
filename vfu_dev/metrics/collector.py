"""The collector: one snapshot a scrape, handed to each subsystem; one that fails does not hide the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from types import ModuleType

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.metrics import faults, forecast, load, memory, migration, regions, server
from vfu_dev.metrics.families import Metric

logger = logging.getLogger(__name__)

SUBSYSTEMS: tuple[ModuleType, ...] = (server, regions, memory, load, migration, forecast, faults)

SNAPSHOT_SECONDS = Metric(
    "vfu_scrape_snapshot_seconds",
    "gauge",
    "Time that the previous snapshot took on the device's thread: MMIO waits that long once per scrape.",
)
COLLECTOR_SECONDS = Metric(
    "vfu_scrape_collector_duration_seconds",
    "gauge",
    "Time that this part of the scrape took; none of it on the device's thread.",
    ("collector",),
)
COLLECTOR_SUCCESS = Metric(
    "vfu_scrape_collector_success",
    "gauge",
    "1 when this part of the scrape worked; at 0 its metrics are missing and the log says why.",
    ("collector",),
)
_OWN = (SNAPSHOT_SECONDS, COLLECTOR_SECONDS, COLLECTOR_SUCCESS)

ALL_METRICS: tuple[Metric, ...] = (
    tuple(metric for subsystem in SUBSYSTEMS for metric in subsystem.METRICS) + _OWN
)


class DeviceCollector(Collector):
    """Everything about one device.

    Args:
        source: returns the device as it is now.
        clock: seconds, for the durations of the scrape itself.
    """

    def __init__(
        self, source: Callable[[], Snapshot], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._source = source
        self._clock = clock

    def describe(self) -> Iterator[Family]:
        """Yield every family, without samples and without asking the server."""
        for metric in ALL_METRICS:
            yield metric.family()

    def collect(self) -> Iterator[Family]:
        """Yield every family, all from the same moment."""
        snapshot = self._source()
        seconds, success = [], []
        for subsystem in SUBSYSTEMS:
            name = subsystem.__name__.rpartition(".")[2]
            began = self._clock()
            try:
                families = list(subsystem.collect(snapshot))
            except Exception:
                logger.exception("%s: collector %s failed", snapshot.device, name)
                families = []
            yield from families
            seconds.append(((name,), self._clock() - began))
            success.append(((name,), int(bool(families))))
        yield SNAPSHOT_SECONDS.one(snapshot.device, snapshot.snapshot_seconds)
        yield COLLECTOR_SECONDS.many(snapshot.device, seconds)
        yield COLLECTOR_SUCCESS.many(snapshot.device, success)


def device_registry(source: Callable[[], Snapshot]) -> CollectorRegistry:
    """Return a registry of its own with the device's collector in it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DeviceCollector(source))
    return registry
