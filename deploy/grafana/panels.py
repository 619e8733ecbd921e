"""Grafana's panels as functions: what the kinds that the dashboard uses have in common, and their places."""

from __future__ import annotations

from typing import Any

from vfu_dev.uapi import DeviceState

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

STATE_COLORS = {
    "ERROR": "dark-red",
    "STOP": "text",
    "RUNNING": "green",
    "STOP_COPY": "orange",
    "RESUMING": "purple",
    "RUNNING_P2P": "light-green",
    "PRE_COPY": "blue",
    "PRE_COPY_P2P": "light-blue",
}

Json = dict[str, Any]
Steps = list[tuple[str, float | None]]  # (colour, from which value), the first without a value


class Layout:
    """Places panels from left to right on Grafana's 24 columns, and numbers them."""

    def __init__(self) -> None:
        self.panels: list[Json] = []
        self._x = self._y = self._row_height = 0

    def row(self, title: str) -> None:
        """Start a headed row."""
        self._break()
        self._add({"type": "row", "title": title, "collapsed": False, "panels": []}, 24, 1)

    def add(self, panel: Json, width: int = 12, height: int = 10) -> None:
        """Place `panel`, on the next line if it does not fit."""
        self._add(panel, width, height)

    def _add(self, panel: Json, width: int, height: int) -> None:
        if self._x + width > 24:
            self._break()
        position = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append({"id": len(self.panels) + 1, **panel, "gridPos": position})
        self._x += width
        self._row_height = max(self._row_height, height)

    def _break(self) -> None:
        self._x, self._y, self._row_height = 0, self._y + self._row_height, 0


def panel(
    kind: str,
    title: str,
    description: str,
    queries: dict[str, str],
    *,
    unit: str,
    options: Json,
    instant: bool = False,
    custom: Json | None = None,
    defaults: Json | None = None,
    overrides: list[Json] | None = None,
) -> Json:
    """Return a panel; `queries` are legend -> PromQL expression, drawn in that order."""
    field: Json = {"unit": unit, **(defaults or {}), "custom": custom or {}}
    targets = []
    for letter, (legend, expr) in zip("ABCDEFGH", queries.items(), strict=False):
        target: Json = {"refId": letter, "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
        target |= {"instant": True, "range": False} if instant else {"range": True}
        targets.append(target)
    assert len(targets) == len(queries)
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": field, "overrides": overrides or []},
        "options": options,
    }


def graph(
    title: str,
    description: str,
    queries: dict[str, str],
    unit: str,
    *,
    dashed: tuple[str, ...] = (),
    stack: bool = False,
    red_below: float | None = None,
    logarithmic: bool = False,
) -> Json:
    """Return a panel of curves over time; those whose legend contains one of `dashed` are limits."""
    custom: Json = {
        "lineWidth": 2,
        "fillOpacity": 30 if stack else 5,
        "showPoints": "never",
        "spanNulls": 3000,
    }
    custom["stacking"] = {"mode": "normal" if stack else "none", "group": "A"}
    defaults: Json = {"min": 0}
    if logarithmic:
        defaults = {}
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    if red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "transparent", "value": red_below}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        custom["thresholdsStyle"] = {"mode": "line+area"}
    overrides = [
        {
            "matcher": {"id": "byRegexp", "options": f"/{name}/"},
            "properties": [
                {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}},
                {"id": "custom.fillOpacity", "value": 0},
            ],
        }
        for name in dashed
    ]
    options = {
        "legend": {
            "displayMode": "list",  # a table of the same height shows two of fifteen curves
            "placement": "bottom",
            "showLegend": True,
            "calcs": [],
        },
        "tooltip": {"mode": "multi", "sort": "none"},
    }
    return panel(
        "timeseries",
        title,
        description,
        queries,
        unit=unit,
        options=options,
        custom=custom,
        defaults=defaults,
        overrides=overrides,
    )


def state_mappings() -> list[Json]:
    """Return how the number of a state is shown: its name in the kernel, and a colour."""
    options = {
        str(int(state)): {"text": state.name, "color": STATE_COLORS[state.name], "index": index}
        for index, state in enumerate(DeviceState)
    }
    return [{"type": "value", "options": options}]


def stat(
    title: str,
    description: str,
    expr: str,
    unit: str,
    steps: Steps,
    *,
    legend: str = "{{device}}",
    mappings: list[Json] | None = None,
) -> Json:
    """Return a panel of one big number a device."""
    thresholds = [{"color": color, "value": value} for color, value in steps]
    defaults: Json = {
        "color": {"mode": "thresholds"},
        "thresholds": {"mode": "absolute", "steps": thresholds},
        "mappings": mappings or [],
        "noValue": "-",
    }
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "background" if mappings else "value",
        "graphMode": "none",
        "textMode": "value_and_name",
        "justifyMode": "auto",
        "orientation": "horizontal",  # a line a device
    }
    # Instant: the last value of the time shown may be one of a migration that is long over.
    return panel(
        "stat",
        title,
        description,
        {legend: expr},
        unit=unit,
        options=options,
        instant=True,
        defaults=defaults,
    )


def bars(title: str, description: str, legend: str, expr: str, *, buckets: bool = False) -> Json:
    """Return a panel of horizontal bars: how often each thing happened in the time shown."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal",
        "displayMode": "basic",
        "showUnfilled": True,
    }
    result = panel(
        "bargauge",
        title,
        description,
        {legend: expr},
        unit="short",
        options=options,
        instant=True,
        defaults={"min": 0, "decimals": 0},
    )
    if buckets:
        result["targets"][0]["format"] = "heatmap"  # cumulative buckets become counts
    return result


def timeline(title: str, description: str, legend: str, expr: str, mappings: list[Json]) -> Json:
    """Return a panel of coloured bands over time."""
    options = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "left",
        "rowHeight": 0.9,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return panel(
        "state-timeline",
        title,
        description,
        {legend: expr},
        unit="short",
        options=options,
        custom={"lineWidth": 0, "fillOpacity": 80},
        defaults={"mappings": mappings},
    )


def table(
    title: str, description: str, expr: str, *, hidden: tuple[str, ...], renamed: dict[str, str]
) -> Json:
    """Return a panel with a line a series, its labels as columns."""
    result = panel(
        "table",
        title,
        description,
        {"": expr},
        unit="short",
        options={"showHeader": True, "cellHeight": "sm"},
        instant=True,
    )
    result["targets"][0]["format"] = "table"
    columns = {"excludeByName": dict.fromkeys(hidden, True), "indexByName": {}, "renameByName": renamed}
    result["transformations"] = [{"id": "organize", "options": columns}]
    return result
