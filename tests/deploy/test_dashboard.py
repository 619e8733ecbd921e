"""Grafana's dashboard: written by its script, known to Grafana's schema, provisioned by files that fit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from expressions import DASHBOARD, dashboard, records
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from promkit import DEPLOY
from serverkit import PATIENCE_SECONDS

GRAFANA = DEPLOY / "grafana"


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of what is in `given` and not, or not the same, in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}/{index}")
    elif given != kept:
        yield path


def read_by_grafana(text: dict[str, Any]) -> Any:
    """Return what is left of a dashboard when it went through the classes made from Grafana's schemas."""
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(text)))


def test_the_script_wrote_it() -> None:
    command: list[str | Path] = [sys.executable, GRAFANA / "dashboard.py", "--check"]
    done = subprocess.run(command, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, "run: python deploy/grafana/dashboard.py"


def test_grafanas_schema_knows_every_field() -> None:
    text = dashboard()
    assert list(lost(text, read_by_grafana(copy.deepcopy(text)))) == []


def _misspell_option(text: dict[str, Any]) -> None:
    text["panels"][9]["options"]["legnd"] = text["panels"][9]["options"].pop("legend")


def _misspell_field(text: dict[str, Any]) -> None:
    text["panels"][9]["fieldConfig"]["defaults"]["custom"]["fillOpactiy"] = 5


def _misspell_target(text: dict[str, Any]) -> None:
    text["panels"][9]["targets"][0]["legendformat"] = "x"


@pytest.mark.parametrize("damage", [_misspell_option, _misspell_field, _misspell_target])
def test_the_schema_would_notice(damage: Callable[[dict[str, Any]], None]) -> None:
    """A field with a wrong name does not come through, so that the test above can fail."""
    text = dashboard()
    assert text["panels"][9]["type"] == "timeseries"
    damage(text)
    assert len(list(lost(text, read_by_grafana(copy.deepcopy(text))))) == 1


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_ids_and_legends_are_unique() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]


def test_limits_are_those_of_the_rules() -> None:
    variables = {one["name"]: one["query"] for one in dashboard()["templating"]["list"]}
    assert f"vector({variables['downtime_limit']})" == records()["vfu:downtime_limit:seconds"]
    assert f"vector({variables['max_bandwidth']})" == records()["vfu:max_bandwidth:bytes_per_second"]


def test_provisioning_points_at_what_is_there() -> None:
    """The data source polls as often as Prometheus scrapes; the folder is where compose mounts dashboards."""
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/vfu-dev.yml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY / "container/compose.yaml").read_text())
    grafana = compose["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert mounts["../grafana/dashboards"] == provider["options"]["path"]
    variable = source["url"].removeprefix("${").removesuffix("}")
    assert grafana["environment"][variable] == "http://prometheus:9090"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
