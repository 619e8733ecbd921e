"""The results of a scenario as CSV, one row per move."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vfu_dev.errors import ConfigError
from vfu_dev.lab.result import DeviceResult, MigrationResult


class MoveMetric(NamedTuple):
    """A column with a figure: its unit, what it is, and whether more of it is worse."""

    unit: str
    about: str
    worse: bool = True


METRICS: dict[str, MoveMetric] = {
    "downtime_ms": MoveMetric(
        "ms", "downtime as QEMU's source measures it, the destination's resume included"
    ),
    "outage_ms": MoveMetric(
        "ms", "from the stop of the source's device to the start of the destination's; the longest device"
    ),
    "device_downtime_ms": MoveMetric("ms", "as the source's servers measure it; the longest device"),
    "stop_copy_ms": MoveMetric("ms", "from STOP_COPY to the last byte read; the longest device"),
    "predicted_ms": MoveMetric(
        "ms",
        "downtime predicted when the devices stopped, summed: QEMU takes them one after the other",
        False,
    ),
    "expected_ms": MoveMetric("ms", "QEMU's own last expected-downtime; it counts RAM only", False),
    "total_ms": MoveMetric("ms", "the whole migration"),
    "setup_ms": MoveMetric("ms", "its setup"),
    "passes": MoveMetric("", "passes over the dirty pages in PRE_COPY; the device with the most"),
    "initial_bytes": MoveMetric("bytes", "initial data, all devices"),
    "precopy_bytes": MoveMetric("bytes", "stream bytes read in PRE_COPY, all devices"),
    "stop_copy_bytes": MoveMetric("bytes", "stream bytes read in STOP_COPY, all devices"),
    "vfio_bytes": MoveMetric("bytes", "device state, as QEMU counts it"),
    "transferred_bytes": MoveMetric("bytes", "all bytes that QEMU sent, RAM included"),
    "pages_sent": MoveMetric("pages", "pages in the stream, all devices"),
    "pages_resent": MoveMetric("pages", "of these, pages that had been sent before"),
    "resident_source_bytes": MoveMetric(
        "bytes", "memory: the most that the source's servers had resident, all devices"
    ),
    "resident_destination_bytes": MoveMetric("bytes", "the same of the destination's servers"),
    "dirty_rate": MoveMetric("bytes/s", "dirty rate when PRE_COPY ended, all devices", False),
    "transfer_rate": MoveMetric("bytes/s", "transfer rate when PRE_COPY ended, all devices", False),
    "downtime_limit_ms": MoveMetric("ms", "QEMU's downtime limit at the end, as the policy left it", False),
    "policy_steps": MoveMetric("", "rules of the policy that acted", False),
}
TEXTS = ("point", "move", "started", "status", "digest_match", "digests", "text")
# Last, since results of before November 2026 lack it.
MACHINE = "machine"
COLUMNS = (*TEXTS, *METRICS, MACHINE)
COMPLETED, NOT_CONVERGED, FAILED = "completed", "not-converged", "failed"


@dataclass
class Row:
    """One move of one point. `metrics` lacks unknown figures; `text` is the error or the reason.

    `machine` is the `machine_id` of where it was made.
    """

    point: str
    move: int
    started: float
    status: str
    metrics: dict[str, float]
    digest_match: bool = False
    digests: str = ""
    text: str = ""
    machine: str = ""

    def cells(self) -> list[str]:
        """Return the row's cells in the order of `COLUMNS`."""
        texts = [self.point, str(self.move), f"{self.started:.6f}", self.status]
        texts += [str(int(self.digest_match)), self.digests, self.text]
        figures = (self.metrics.get(name) for name in METRICS)
        return [*texts, *("" if value is None else f"{value:.10g}" for value in figures), self.machine]

    @classmethod
    def from_cells(cls, cells: Mapping[str, str]) -> Row:
        """Return the row that a CSV reader read. Raises: KeyError, ValueError: it is none."""
        if None in cells.values() or None in cells:
            raise ValueError(f"a row with {'fewer' if None in cells.values() else 'more'} cells than columns")
        return cls(
            point=cells["point"],
            move=int(cells["move"]),
            started=float(cells["started"]),
            status=cells["status"],
            digest_match=cells["digest_match"] == "1",
            digests=cells["digests"],
            text=cells["text"],
            metrics={name: _finite(name, cells[name]) for name in METRICS if cells.get(name)},
            machine=cells.get(MACHINE, ""),
        )


def _finite(name: str, text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{name}: {text} is no figure")
    return value


def row_of(point: str, move: int, status: str, result: MigrationResult, text: str = "") -> Row:
    """Return the row of one move."""
    devices, qemu = result.devices, result.qemu
    stood = result.convergence or {}
    figures: dict[str, float | None] = {
        "downtime_ms": qemu.downtime_ms,
        "outage_ms": _most(1000, (_outage_seconds(device) for device in devices)),
        "device_downtime_ms": _most(1000, (device.downtime_seconds for device in devices)),
        "stop_copy_ms": _most(1000, (device.stop_copy_seconds for device in devices)),
        "predicted_ms": _sum(1000, [device.predicted_downtime_seconds for device in devices]),
        "expected_ms": qemu.expected_downtime_ms,
        "total_ms": qemu.total_ms,
        "setup_ms": qemu.setup_ms,
        "passes": _most(1, (device.passes for device in devices)),
        "vfio_bytes": qemu.vfio_bytes,
        "transferred_bytes": qemu.transferred_bytes,
        "dirty_rate": stood.get("dirty_rate_bytes_per_second"),
        "transfer_rate": stood.get("transfer_rate_bytes_per_second"),
        "downtime_limit_ms": qemu.downtime_limit_ms,
        "policy_steps": len(result.policy),
    }
    for name in ("initial_bytes", "precopy_bytes", "stop_copy_bytes", "pages_sent", "pages_resent"):
        figures[name] = sum(getattr(device, name) for device in devices) if devices else None
    for name in ("resident_source_bytes", "resident_destination_bytes"):
        sizes = [getattr(device, name) for device in devices]
        figures[name] = sum(sizes) if sizes and all(sizes) else None
    if status != COMPLETED:
        # Figures that an earlier migration left in a server do not belong to this one.
        for name in ("outage_ms", "device_downtime_ms", "stop_copy_ms", "predicted_ms"):
            figures[name] = None
    return Row(
        point=point,
        move=move,
        started=result.started,
        status=status,
        digest_match=bool(devices) and all(device.digest_match for device in devices),
        digests=" ".join(device.digest_source or "-" for device in devices),
        text=" ".join(text.split()),
        metrics={name: float(value) for name, value in figures.items() if value is not None},
    )


def _most(factor: float, values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return factor * max(known) if known else None


def _sum(factor: float, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return factor * sum(known) if known and len(known) == len(values) else None


def _outage_seconds(device: DeviceResult) -> float | None:
    """From the device's stop here to its start there; both servers read this machine's clock."""
    running = ("PRE_COPY", "PRE_COPY_P2P", "RUNNING", "RUNNING_P2P")
    stops = [
        change["time"]
        for change in device.transitions_source
        if change["from"] in running and change["to"] not in running
    ]
    starts = [change["time"] for change in device.transitions_destination if change["to"] == "RUNNING"]
    return starts[-1] - stops[-1] if stops and starts and starts[-1] > stops[-1] else None


class CsvFile:
    """Rows appended one by one, each on disk before the next move begins; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def append(self, row: Row) -> None:
        """Write one row."""
        self._writer.writerow(row.cells())
        self._file.flush()

    def __enter__(self) -> CsvFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file. Raises: ConfigError: it cannot be read or is something else."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet writes a byte order mark
            return [Row.from_cells(cells) for cells in csv.DictReader(file)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not the moves of `vfu-dev lab run`: {error}") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV file at once or not at all."""
    partial = path.with_name(path.name + ".part")
    with CsvFile(partial) as file:
        for row in rows:
            file.append(row)
    partial.replace(path)


def values_of(rows: Iterable[Row], metric: str) -> list[float]:
    """Return `metric` of the completed moves that have it, in order."""
    return [row.metrics[metric] for row in rows if row.status == COMPLETED and metric in row.metrics]
