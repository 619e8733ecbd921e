"""Two result folders of `vfu-dev lab run`, point by point: ratios of percentiles, and whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vfu_dev import JSON_VERSION
from vfu_dev.errors import ConfigError, LabError
from vfu_dev.machine import describe_machine, same_machine
from vfu_dev.series.rows import METRICS, Row, read_rows, values_of
from vfu_dev.series.statistics import difference, percentiles
from vfu_dev.series.summary import read_summary

KIND = "lab-compare"
DEFAULT_METRICS = ("downtime_ms", "outage_ms", "total_ms", "stop_copy_bytes", "vfio_bytes", "passes")


def compare(
    first: Path, second: Path, metrics: Sequence[str] = (), across_machines: bool = False
) -> dict[str, Any]:
    """Return the comparison of two result folders.

    Points are matched by name; where both folders have a single point each, those two are matched. `entries`
    has one object for each point and metric that both sides measured; `settings` lists for each point the
    settings that differ between the sides; `only` names the points without a partner.

    `missing` lists points and metrics that only one side measured; `machines` has for each point that two
    machines made both of them, in words.

    Args: across_machines: compare such points too; a difference may then be the machines'.
    Raises: ConfigError: a folder holds no result, nothing matches, a metric is unknown, or two machines made
            a point.
            LabError: there is nothing to compare: no completed move, or none with a metric asked for.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"metric {metric!r}: expected one of {', '.join(METRICS)}")
    sides = [_side(folder) for folder in (first, second)]
    names = [list(side["rows"]) for side in sides]
    pairs = [(name, name) for name in names[0] if name in names[1]]
    if not pairs and len(names[0]) == len(names[1]) == 1:
        pairs = [(names[0][0], names[1][0])]
    if not pairs:
        raise ConfigError(f"{first} and {second}: no point in common: {names[0]} and {names[1]}")
    machines = {
        mine: [describe_machine(one), describe_machine(two)]
        for mine, other in pairs
        if not same_machine(one := sides[0]["machines"][mine], two := sides[1]["machines"][other])
    }
    if machines and not across_machines:
        point, both = next(iter(machines.items()))
        raise ConfigError(
            f"{point} was made by {both[0]} in {first} and by {both[1]} in {second}: a difference may be the "
            "machines'; --across-machines compares them all the same"
        )
    entries, missing = [], []
    for mine, other in pairs:
        for metric in metrics or DEFAULT_METRICS:
            values = [
                values_of(side["rows"][n], metric) for side, n in zip(sides, (mine, other), strict=True)
            ]
            if not all(values):
                if any(values) or metrics:
                    lacks = [str(folder) for folder, v in zip((first, second), values, strict=True) if not v]
                    missing.append(f"{mine}: no completed move with {metric} in {' and '.join(lacks)}")
                continue
            found = difference(*values)
            entries.append(
                {
                    "point": mine if mine == other else f"{mine} / {other}",
                    "metric": metric,
                    "unit": METRICS[metric].unit,
                    "first": percentiles(values[0]),
                    "second": percentiles(values[1]),
                    **found.to_json(),
                    "regression": regression(metric, found.ratios["p50"], found.significant),
                }
            )
    if not entries or (metrics and missing):
        reason = "; ".join(missing) or f"no completed move in {first} or {second}"
        raise LabError(f"nothing to compare: {reason}")
    settings = [side["settings"] for side in sides]
    matched = {name for pair in pairs for name in pair}
    return {
        "kind": KIND,
        "version": JSON_VERSION,
        "first": sides[0]["about"],
        "second": sides[1]["about"],
        "entries": entries,
        "missing": missing,
        "machines": machines,
        "settings": {
            mine: told for mine, other in pairs if (told := _changed(settings[0][mine], settings[1][other]))
        },
        "only": [[name for name in side if name not in matched] for side in names],
    }


def regression(metric: str, ratio: float | None, significant: bool) -> float | None:
    """Return by how many percent the second median is worse; None where it is not worse, or not known."""
    if ratio is None or not significant or not METRICS[metric].worse or ratio <= 1:
        return None
    return (ratio - 1) * 100


def _changed(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    """Return key -> both values, of settings that differ; the number of moves is not a setting."""
    keys = sorted((first.keys() | second.keys()) - {"run.moves"})
    pairs = {key: [first.get(key), second.get(key)] for key in keys}
    # A key that an older run did not know is as if it was empty there.
    return {key: pair for key, pair in pairs.items() if (pair[0] or None) != (pair[1] or None)}


def _side(folder: Path) -> dict[str, Any]:
    summary = read_summary(folder)
    rows: dict[str, list[Row]] = {point["name"]: [] for point in summary["points"]}
    for row in read_rows(folder / "moves.csv"):
        rows.setdefault(row.point, []).append(row)
    about = {key: summary[key] for key in ("scenario", "short", "versions", "machine", "started")}
    settings = {point["name"]: {**point["settings"], "load": point["load"]} for point in summary["points"]}
    # Results of before November 2026 name one machine, for all of their points.
    machines = {point["name"]: point.get("machine", summary["machine"]) for point in summary["points"]}
    found = {"rows": rows, "settings": settings, "machines": machines}
    return {**found, "about": {"folder": str(folder), **about}}
