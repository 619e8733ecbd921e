"""Does it converge, and what will the downtime be: the figures of `vfu_dev.migration.forecast`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family

from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.metrics.families import Metric

INITIAL = Metric(
    "vfu_migration_initial_bytes",
    "gauge",
    "initial_bytes of struct vfio_precopy_info: initial state still to be read, stream bytes; 0 outside "
    "PRE_COPY. It only falls.",
)
DIRTY = Metric(
    "vfu_migration_dirty_bytes",
    "gauge",
    "dirty_bytes of struct vfio_precopy_info: state written since it was sent, stream bytes; 0 outside "
    "PRE_COPY. A rise over several passes means that the guest writes faster than the client reads.",
)
STOP_COPY_LENGTH = Metric(
    "vfu_migration_stop_copy_length_bytes",
    "gauge",
    "Stream bytes still to be read if the device stopped now; 0 outside the saving states. The client "
    "stops the device when this falls below bandwidth x downtime limit.",
)
DIRTY_RATE = Metric(
    "vfu_migration_dirty_rate_bytes_per_second",
    "gauge",
    "Distinct pages that the guest writes in a sampling interval, as stream bytes a second; 0 when no "
    "migration runs. If it stays above the transfer rate, the migration cannot converge.",
)
TRANSFER_RATE = Metric(
    "vfu_migration_transfer_rate_bytes_per_second",
    "gauge",
    "Stream bytes a second that the client reads while there is something to read; 0 when no migration runs. "
    "A fall means a slower link, or a client that does other work.",
)
CONVERGENCE = Metric(
    "vfu_migration_convergence_ratio",
    "gauge",
    "Transfer rate over dirty rate. Above 1 the migration converges; +Inf when nothing "
    "is written. Below 1 it does not, unless the client does other work now and will "
    "read faster later: see vfu_migration_converging. Absent when no migration runs, and "
    "until both rates are known.",
)
CONVERGING = Metric(
    "vfu_migration_converging",
    "gauge",
    "1 while the client reads faster than the guest writes. 0 when it has read as many "
    "bytes as were left, and no fewer are left: the migration will not end. Absent while "
    "neither is known, for example while QEMU sends RAM first, and without a migration.",
)
ESTIMATED_STOP_COPY = Metric(
    "vfu_migration_estimated_stop_copy_seconds",
    "gauge",
    "Estimated time to read the state in STOP_COPY if the device stopped now. Absent when it is not known.",
)
PREDICTED_DOWNTIME = Metric(
    "vfu_migration_predicted_downtime_seconds",
    "gauge",
    "Predicted downtime of this device if it stopped now: the estimated STOP_COPY and "
    "everything else. QEMU takes the devices of a VM one after the other. While it is "
    "above the client's downtime limit, the client stays in PRE_COPY. Absent until it "
    "can be predicted.",
)
LAST_STOP_COPY = Metric(
    "vfu_migration_last_stop_copy_seconds",
    "gauge",
    "Measured time of STOP_COPY of the last outgoing migration that went on to STOP. "
    "Absent before the first.",
)
LAST_DOWNTIME = Metric(
    "vfu_migration_last_downtime_seconds",
    "gauge",
    "Measured downtime of the last outgoing migration that went on to STOP. Absent before the first.",
)
LAST_PREDICTED = Metric(
    "vfu_migration_last_predicted_downtime_seconds",
    "gauge",
    "Downtime predicted for that migration when the device stopped. A large difference "
    "from the measured downtime means that rates changed with the stop.",
)

METRICS = (
    INITIAL,
    DIRTY,
    STOP_COPY_LENGTH,
    DIRTY_RATE,
    TRANSFER_RATE,
    CONVERGENCE,
    CONVERGING,
    ESTIMATED_STOP_COPY,
    PREDICTED_DOWNTIME,
    LAST_STOP_COPY,
    LAST_DOWNTIME,
    LAST_PREDICTED,
)


def collect(snapshot: Snapshot) -> Iterator[Family]:
    """Yield the families of this file."""
    device, forecast = snapshot.device, snapshot.forecast
    yield INITIAL.one(device, forecast["initial_bytes"] or 0)
    yield DIRTY.one(device, forecast["dirty_bytes"] or 0)
    yield STOP_COPY_LENGTH.one(device, forecast["stop_copy_length_bytes"] or 0)
    yield DIRTY_RATE.one(device, forecast["dirty_rate_bytes_per_second"] or 0)
    yield TRANSFER_RATE.one(device, forecast["transfer_rate_bytes_per_second"] or 0)
    yield CONVERGENCE.one(device, convergence_ratio(forecast))
    yield CONVERGING.one(device, forecast["converging"])
    yield ESTIMATED_STOP_COPY.one(device, forecast["estimated_stop_copy_seconds"])
    yield PREDICTED_DOWNTIME.one(device, forecast["predicted_downtime_seconds"])
    yield LAST_STOP_COPY.one(device, snapshot.last_stop_copy_seconds)
    yield LAST_DOWNTIME.one(device, snapshot.last_downtime_seconds)
    yield LAST_PREDICTED.one(device, snapshot.last_predicted_downtime_seconds)


def convergence_ratio(forecast: dict[str, float | None]) -> float | None:
    """Return transfer rate over dirty rate; JSON has no infinity, so it is not stored but computed here."""
    dirty, transfer = forecast["dirty_rate_bytes_per_second"], forecast["transfer_rate_bytes_per_second"]
    if dirty is None or transfer is None:
        return None
    return transfer / dirty if dirty else float("inf")
