"""Makes the plain figures of one served device, in the thread that owns it."""

from __future__ import annotations

import platform
import time

from vfu_dev import __version__
from vfu_dev.device import Device
from vfu_dev.device.reference.workload import MakesWorkload
from vfu_dev.faults import OPERATIONS
from vfu_dev.figures import Figures, Snapshot
from vfu_dev.libvfio_user import Library
from vfu_dev.migration.fsm import ARCS
from vfu_dev.uapi import DeviceState, MigrationFlags

# Samples per answer: 0.1 ms of the device's thread. A caller that wants more asks again.
_MAX_SAMPLES = 100

_FLAG_NAMES = {
    MigrationFlags.VFIO_MIGRATION_STOP_COPY: "stop_copy",
    MigrationFlags.VFIO_MIGRATION_P2P: "p2p",
    MigrationFlags.VFIO_MIGRATION_PRE_COPY: "pre_copy",
}


class SnapshotMaker:
    """Reads the counters of `device` and its migration. It scans no page and changes nothing.

    Args: profile: name of the one that the device replays.
    """

    def __init__(self, device: Device, library: Library, profile: str = "") -> None:
        self.faults: dict[str, int] = dict.fromkeys(OPERATIONS, 0)  # the server puts its board's there
        self._device = device
        identity = device.identity
        self._build = {"version": __version__, "python": platform.python_version()}
        self._library = {"path": str(library.path), "api": library.api}
        self._identity = {
            "type": device.type_name,
            "pci_id": f"{identity.vendor:04x}:{identity.device:04x}",
            "migration": ",".join(name for flag, name in _FLAG_NAMES.items() if flag in device.flags),
            "profile": profile,
        }
        self._seconds = 0.0

    def figures(self, connected: bool, after: int) -> Figures:
        """Return everything, with samples after number `after`."""
        began = time.perf_counter()
        observer = self._device.migration.observer
        sequence, samples = observer.samples_after(after, _MAX_SAMPLES)
        figures = Figures(self._snapshot(connected), sequence, sequence < observer.sampled, samples)
        self._seconds = time.perf_counter() - began
        return figures

    def _snapshot(self, connected: bool) -> Snapshot:
        device = self._device
        migration = device.migration
        observer, counters = migration.observer, device.counters
        # Every arc there is, so that a series exists before its first rise; then what only resets do.
        arcs = {(arc.origin, arc.target): 0 for arc in ARCS} | observer.arcs
        scans = [memory.scans for memory in device.memories]
        return Snapshot(
            device=device.name,
            build=self._build,
            library=self._library,
            identity=self._identity,
            states=[state.name for state in DeviceState],
            state=migration.state.name,
            state_entered=observer.entered,
            connected=connected,
            counters=counters.as_dict(),
            refused={
                "bounds": counters.refused_accesses - counters.refused_by_state,
                "state": counters.refused_by_state,
            },
            memories=[
                {
                    "name": memory.name,
                    "size_bytes": memory.size_bytes,
                    "page_size_bytes": memory.page_size_bytes,
                    "written_bytes": memory.written_bytes,
                }
                for memory in device.memories
            ],
            load=self._load(),
            transitions=[(origin.name, target.name, count) for (origin, target), count in arcs.items()],
            totals=observer.sums(),
            scans={
                "count": sum(scan.count for scan in scans),
                "pages": sum(scan.pages for scan in scans),
                "seconds": sum(scan.ns for scan in scans) / 1e9,
            },
            histograms={
                "region_read": counters.reads.seconds.as_dict(),
                "region_write": counters.writes.seconds.as_dict(),
                "migration_read": observer.read_seconds.as_dict(),
                "stop_copy": observer.stop_copy_seconds.as_dict(),
                "downtime": observer.downtime_seconds.as_dict(),
            },
            forecast=observer.forecast.as_dict(),
            faults=dict(self.faults),
            save=migration.saved(),
            received_bytes=migration.received(),
            last_stop_copy_seconds=observer.last_stop_copy_seconds,
            last_downtime_seconds=observer.last_downtime_seconds,
            last_predicted_downtime_seconds=observer.last_predicted_downtime_seconds,
            snapshot_seconds=self._seconds,
        )

    def _load(self) -> dict[str, float]:
        """Return the sums over the loads that the device makes: an operator's, and one behind registers."""
        loads = [worker.rates() for worker in self._device.workers if isinstance(worker, MakesWorkload)]
        return {
            "asked_rate_bytes": sum(load.asked_rate_bytes for load in loads),
            "reached_rate_bytes": sum(load.reached_rate_bytes for load in loads),
            "missed_writes": sum(load.missed_writes for load in loads),
        }
