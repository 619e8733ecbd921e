"""Compares predictions with the measurements of `vfu-dev lab run`, for each point of a result folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from vfu_dev.errors import ConfigError
from vfu_dev.model.link import Link, qemu_link
from vfu_dev.model.predict import Prediction, predict
from vfu_dev.series.rows import Row, read_rows
from vfu_dev.series.scenario import Point
from vfu_dev.series.summary import read_summary
from vfu_dev.workload import Workload

COMPLETED = "completed"


@dataclass(frozen=True)
class Compared:
    """One point: the prediction, and the measurements of its moves.

    Attributes:
        converged: share of the moves that completed.
        measured: median of each figure over the moves that did; those that did not have none.
    """

    name: str
    settings: Mapping[str, Any]
    load: Workload
    link: Link
    prediction: Prediction
    converged: float
    measured: Mapping[str, float]

    @property
    def agrees(self) -> bool:
        """Whether prediction and measurement agree about convergence."""
        return self.prediction.converges == (self.converged > 0.5)


def link_of(settings: Mapping[str, Any], stop_bandwidth: float = 0.0, reached: float = math.inf) -> Link:
    """Return the link of a scenario's point.

    Args: reached: bytes a second that were measured: on a busy machine, less than was allowed.
    """
    link = qemu_link(
        settings["qemu.max-bandwidth"],
        downtime_limit_seconds=settings["qemu.downtime-limit"] / 1000,
        switchover_bandwidth=settings["qemu.avail-switchover-bandwidth"],
        initial_first=settings["qemu.switchover-ack"],
        stop_bandwidth=stop_bandwidth,
    )
    return replace(link, bandwidth=min(link.bandwidth, reached))


def predict_point(settings: Mapping[str, Any], load: Workload, link: Link) -> Prediction:
    """Return the prediction for a point of a scenario with one device and without a guest.

    Raises: ConfigError: a class of the user's own, several devices, a guest whose RAM shares the link, no
                pre-copy, a policy, a replayed profile, or a trace.
    """
    if settings.get("qemu.policy"):
        raise ConfigError("the model covers parameters that stay as they are")
    if settings.get("device.class") is not None:
        raise ConfigError("the model covers the reference device only")
    if settings.get("device.profile") is not None:
        raise ConfigError("the model covers a load on the device's memory: a profile is none")
    if settings["device.devices"] != 1 or settings["qemu.guest"] != "none" or not settings["qemu.pre-copy"]:
        raise ConfigError("the model covers one device, with pre-copy, alone on its link")
    page = settings["device.page-size"]
    return predict(
        load,
        settings["device.memory"] // page,
        link,
        page_bytes=page,
        limit_seconds=settings["run.timeout"],
    )


def reached_bandwidth(row: Row) -> float | None:
    """Return what the link carried in PRE_COPY, bytes a second: over all of it, or as last measured."""
    figures = row.metrics
    if row.status != COMPLETED:
        return figures.get("transfer_rate")
    spent = figures.get("total_ms", 0) - figures.get("downtime_ms", 0) - figures.get("setup_ms", 0)
    return figures["precopy_bytes"] / spent * 1000 if spent > 0 and "precopy_bytes" in figures else None


def annotation(point: Point, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what `run_scenario` adds to a point's summary: the prediction, where the model covers it."""
    del rows
    try:
        return {"model": predict_point(point.settings, point.load, link_of(point.settings)).as_dict()}
    except ConfigError:
        return {}


def stop_bandwidth_of(rows: Sequence[Row]) -> float:
    """Return the median rate at which STOP_COPY was read, bytes a second; 0 where there was too little."""
    rates = sorted(
        row.metrics["stop_copy_bytes"] / row.metrics["stop_copy_ms"] * 1000
        for row in rows
        if row.status == COMPLETED
        and row.metrics.get("stop_copy_ms")
        and row.metrics.get("stop_copy_bytes", 0) > 1 << 20
    )
    return rates[len(rates) // 2] if rates else 0.0


def compare(folder: Path) -> list[Compared]:
    """Return all points of the result folder of a scenario that the model covers.

    Raises: ConfigError: no result folder, or nothing in it that the model covers.
    """
    summary = read_summary(folder)
    rows = read_rows(folder / "moves.csv")
    stop = stop_bandwidth_of(rows)
    found = []
    for point in summary["points"]:
        settings, load = point["settings"], Workload.from_dict(point["load"])
        mine = [row for row in rows if row.point == point["name"]]
        if not mine:
            continue
        rates = [rate for row in mine if (rate := reached_bandwidth(row)) is not None]
        try:
            link = link_of(settings, stop, median(rates) if rates else math.inf)
            prediction = predict_point(settings, load, link)
        except ConfigError:
            continue
        done = [row for row in mine if row.status == COMPLETED]
        measured = {name: figures["p50"] for name, figures in point["metrics"].items()} if done else {}
        share = len(done) / len(mine)
        found.append(Compared(point["name"], settings, load, link, prediction, share, measured))
    if not found:
        raise ConfigError(f"{folder}: no point that the model covers (one device, no guest, pre-copy)")
    return found
