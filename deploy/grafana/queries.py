"""The terms that queries of the dashboard's panels share, and the limits from rules/limits.yml."""

from __future__ import annotations

from pathlib import Path

import yaml

LIMITS = Path(__file__).parents[1] / "prometheus" / "rules" / "limits.yml"

D = '{device=~"$device"}'  # every query is about the devices chosen at the top
IN_PRE_COPY = "and device:vfu_migration_pre_copy:bool == 1"


def limit(record: str) -> str:
    """Return the constant that limits.yml records as `record`."""
    for group in yaml.safe_load(LIMITS.read_text())["groups"]:
        for rule in group["rules"]:
            if rule["record"] == record:
                return str(rule["expr"]).removeprefix("vector(").removesuffix(")")
    raise KeyError(record)


DOWNTIME_LIMIT = limit("vfu:downtime_limit:seconds")
MAX_BANDWIDTH = limit("vfu:max_bandwidth:bytes_per_second")


def rate(metric: str) -> str:
    """Return the rate of a counter of the devices chosen."""
    return f"rate({metric}{D}[$__rate_interval])"


def during_pre_copy(record: str) -> str:
    """Return a recorded figure of the devices chosen, as long as they are in PRE_COPY."""
    return f"device:{record}{D} {IN_PRE_COPY}"


def ended(metric: str, by: str) -> str:
    """Return how far a counter rose in the time shown, by one of its labels."""
    return f"sum by ({by}) (increase({metric}{D}[$__range]))"
