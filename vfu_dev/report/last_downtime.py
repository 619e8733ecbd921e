"""The downtime of a move as a metric of KubeVirt's, for node_exporter's textfile collector."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

# As proposed in https://github.com/kubevirt/kubevirt/pull/17974, which was open in November 2026.
NAME = "kubevirt_vmi_migration_last_downtime_duration_seconds"
HELP = (
    "Downtime of the VM's last successful live migration, as the hypervisor measured it while the vCPUs "
    "were paused. KubeVirt's name and meaning (pull request 17974); written by vfu-dev lab."
)
FILE = "metrics.prom"


def write_last_downtime(result: Mapping[str, Any], folder: Path) -> None:
    """Write `folder`/metrics.prom for the JSON of a move.

    A migration that did not complete leaves the file as it is: the last successful one is another.
    """
    qemu = result["qemu"]
    if qemu["status"] != "completed" or qemu["downtime_ms"] is None:
        return
    registry = CollectorRegistry()
    labels = {"namespace": "vfu-dev", "name": "vm", "node": platform.node()}
    gauge = Gauge(NAME, HELP, list(labels), registry=registry)
    gauge.labels(**labels).set(qemu["downtime_ms"] / 1000)
    write_to_textfile(str(folder / FILE), registry)
