"""Every PromQL expression under deploy/, by where it stands."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from promkit import DEPLOY

DASHBOARD = DEPLOY / "grafana/dashboards/precopy-convergence.json"
RULES = DEPLOY / "prometheus/rules"

_NAME = re.compile(r"\b(?:device:)?vfu[_:][a-zA-Z0-9_:]+")


def rules() -> list[dict[str, Any]]:
    """Return all recording rules and alerts, in the order of files and lines."""
    return [
        rule
        for file in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]


def records() -> dict[str, str]:
    """Return record -> expression."""
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def alerts() -> dict[str, dict[str, Any]]:
    """Return alert name -> rule."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboard() -> dict[str, Any]:
    """Return Grafana's dashboard."""
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def substituted(expr: str) -> str:
    """Return a panel's expression as Grafana sends it, with the variables' defaults and all devices."""
    values = {
        variable["name"]: variable.get("allValue") or variable["query"]
        for variable in dashboard()["templating"]["list"]
    }
    values |= {"__rate_interval": "4s", "__range": "5m"}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expr)


def panels() -> dict[str, str]:
    """Return "panel / legend" -> expression, as Grafana sends it."""
    return {
        f"{panel['title']} / {target['legendFormat']}": substituted(target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    }


def everything() -> dict[str, str]:
    """Return where -> expression, for all there are."""
    return (
        {f"panel {where}": expr for where, expr in panels().items()}
        | {f"record {name}": expr for name, expr in records().items()}
        | {f"alert {name}": rule["expr"] for name, rule in alerts().items()}
    )


def names(expr: str) -> set[str]:
    """Return the metrics and records of ours that an expression is about."""
    return set(_NAME.findall(re.sub(r'"[^"]*"', '""', expr)))
