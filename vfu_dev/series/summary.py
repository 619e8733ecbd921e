"""summary.json: the results of a scenario's run, point by point."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfu_dev import JSON_VERSION
from vfu_dev.errors import ConfigError
from vfu_dev.machine import machine_id, processor
from vfu_dev.series.rows import METRICS, NOT_CONVERGED, Row, values_of
from vfu_dev.series.scenario import METHOD_MOVES, Scenario
from vfu_dev.series.statistics import difference, percentiles
from vfu_dev.whole import write_whole
from vfu_dev.workload import Workload
from vfu_dev.workload.figures import KEEPS_UP

KIND = "lab-run"
SUMMARY = "summary.json"
# What the variants of a scenario are compared by, each with the first one.
COMPARED = ("downtime_ms", "total_ms")
# Moves of a point that a warning names.
NAMED_MOVES = 3


def machine() -> dict[str, Any]:
    """Return the machine's facts: identity, processor, cores, memory, kernel, and its load."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        memory = 0
    return {
        "id": machine_id(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "load_average": list(os.getloadavg()),
    }


def point_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return counts and percentiles of one point's rows; only completed moves count."""
    return {
        "moves": len(rows),
        "statuses": dict(Counter(row.status for row in rows)),
        "digests_equal": sum(row.digest_match for row in rows),
        "metrics": {
            name: figures for name in METRICS if (figures := percentiles(values_of(rows, name)))["n"]
        },
    }


def reached(guest: Mapping[str, Any] | None, load: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the rate that the load of a point was asked for and reached, bytes written a second and device.

    Args: guest: the figures of a guest. load: `load-status` of a device's own engine.
    """
    told = load or guest
    if not told or not told.get("asked_rate_bytes"):
        return None
    asked, found = told["asked_rate_bytes"], told["reached_rate_bytes"]
    return {"asked_rate_bytes": asked, "reached_rate_bytes": found, "carried": found / asked}


def summarise(
    scenario: Scenario,
    short: bool,
    points: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary of a finished run.

    Args: points: what was written of each point (`Point.to_dict`, `point_summary`, problems).
          facts: versions, machines, command, times; `shard`, where these are not all points: then the
          scenario's checks, which are of all of them, are left to the whole.
    """
    names = {str(point["name"]): point["variant"] for point in points}
    by_variant: dict[str | None, list[Row]] = {name: [] for name in scenario.variants}
    by_variant[None] = list(rows)
    for row in rows:
        if names[row.point] is not None:
            by_variant[names[row.point]].append(row)
    first, *others = scenario.variants or (None,)
    comparisons = [
        {
            "metric": metric,
            "first": first,
            "second": other,
            **difference(
                values_of(by_variant[first], metric), values_of(by_variant[other], metric)
            ).to_json(),
        }
        for other in others
        for metric in COMPARED
    ]
    checks = [check.judge(by_variant) for check in scenario.checks if not facts.get("shard")]
    problems = [f"{point['name']}: {text}" for point in points for text in point["problems"]]
    problems += [f"check: {check['text']}" for check in checks if not check["ok"]]
    # The last migration that was given up: the figures that decide convergence.
    stood = {row.point: row.text for row in rows if row.status == NOT_CONVERGED}
    warnings = [
        f"{point['name']}: wrote {Workload.from_dict(point['load']).reached_text(rate)}"
        for point in points
        if (rate := point.get("rate")) and rate["carried"] < KEEPS_UP
    ]
    warnings += [text for point in points if (text := _not_kept_text(point))]
    if len(machines := facts.get("machines", ())) > 1:
        warnings.append(
            f"{len(machines)} machines made these points: times of different machines do not compare"
        )
    expected = [point for point in points if point["settings"]["run.expect"] != "not-converged"]
    fewest = min((point["statuses"].get("completed", 0) for point in expected), default=None)
    return {
        "kind": KIND,
        "version": JSON_VERSION,
        "scenario": scenario.name,
        "title": scenario.title,
        "about": scenario.about,
        "short": short,
        "method_moves": METHOD_MOVES,
        "fewest_moves": fewest,
        **facts,
        "variants": list(scenario.variants),
        "sweep": list(scenario.sweep),
        "points": list(points),
        "comparisons": comparisons,
        "checks": checks,
        "stood": stood,
        "warnings": warnings,
        "problems": problems,
        "ok": not problems,
    }


def load_kept_up(summary: Mapping[str, Any]) -> bool:
    """Return whether the load of each point reached at least 95 % of the rate that was asked for."""
    rates = [rate for point in summary["points"] if (rate := point.get("rate"))]
    return all(rate["carried"] >= KEEPS_UP for rate in rates)


def profile_kept(summary: Mapping[str, Any]) -> bool:
    """Return whether the devices kept to the profile that they replay, its sizes and times, in every move."""
    return not any(point.get("not_kept") for point in summary["points"])


def _not_kept_text(point: Mapping[str, Any]) -> str:
    """Say which moves of a point could not keep to its profile; empty if there are none."""
    moves = point.get("not_kept", ())
    text = "; ".join(f"move {one['move']}: {one['text']}" for one in moves[:NAMED_MOVES])
    more = len(moves) - NAMED_MOVES
    return f"{point['name']}: {text}{f'; and {more} more' if more > 0 else ''}" if text else ""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises: ConfigError: it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary in a result folder. Raises: ConfigError: there is none."""
    path = folder / SUMMARY
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ConfigError(f"{path}: not a result of `vfu-dev lab run`")
    return found
