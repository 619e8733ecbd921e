"""Scrape configuration, rules and alerts: promtool's judgement, and names that exist."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from expressions import alerts, everything, names, records
from promkit import DEPLOY
from serverkit import PATIENCE_SECONDS

from vfu_dev.metrics import ALL_METRICS
from vfu_dev.uapi import DeviceState

PROMETHEUS = DEPLOY / "prometheus"


def run(promtool: Path, *arguments: object, cwd: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [promtool, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def test_promtool_accepts_the_configuration(promtool: Path) -> None:
    for folder in (PROMETHEUS, DEPLOY / "container"):
        for targets in folder.glob("targets/*.yml"):
            assert yaml.safe_load(targets.read_text())[0]["targets"]
    done = run(promtool, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert "3 rule files found" in done.stdout  # the pattern in the configuration finds them all


@pytest.mark.parametrize("file", ["alerts.yml", "slow-alerts.yml", "recording.yml"])
def test_promtool_unit_tests_pass(promtool: Path, file: str) -> None:
    done = run(promtool, "test", "rules", f"tests/{file}")
    assert done.returncode == 0, done.stderr + done.stdout


def _mutants() -> list[tuple[str, str]]:
    """Return (alert, what to do to it)."""
    changes = [(name, change) for name in alerts() for change in ("never fires", "always fires")]
    return changes + [(name, "is not held back") for name, rule in alerts().items() if "for" in rule]


@pytest.mark.parametrize(("alert", "change"), _mutants())
def test_promtool_unit_tests_notice(promtool: Path, tmp_path: Path, alert: str, change: str) -> None:
    """An alert that never fires, or too early, or always, fails the unit tests: each is tested both ways."""
    home = tmp_path / "prometheus"
    shutil.copytree(PROMETHEUS, home)
    file = home / "rules/alerts.yml"
    text = yaml.safe_load(file.read_text())
    (rule,) = (rule for rule in text["groups"][0]["rules"] if rule["alert"] == alert)
    if change == "never fires":
        rule["expr"] = f"({rule['expr']}) and on () vector(1) == 0"
    elif change == "always fires":
        rule["expr"] = '{__name__=~"up|vfu_migration_(state|.*_total|last_downtime_seconds)"} >= 0'
    else:
        del rule["for"]
    file.write_text(yaml.safe_dump(text))
    (tests,) = (file for file in home.glob("tests/*.yml") if f'"{alert}"' in file.read_text())
    done = run(promtool, "test", "rules", tests, cwd=home)
    assert done.returncode == 1, done.stdout
    assert alert in done.stderr + done.stdout


def test_every_name_is_scraped_or_recorded() -> None:
    """Dashboard, rules and alerts use metrics that the server has, and records that the rules make."""
    known = set(records())
    for metric in ALL_METRICS:
        known.add(metric.name)
        if metric.kind == "histogram":
            known |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    unknown = {
        (where, name) for where, expr in everything().items() for name in names(expr) if name not in known
    }
    assert not unknown


def test_every_record_is_used() -> None:
    """A rule that nobody reads would be evaluated every second for nothing."""
    used = {name for where, expr in everything().items() for name in names(expr)}
    # For a person who compares with QEMU's configured bandwidth; the dashboard takes its default from here.
    assert set(records()) - used == {"vfu:max_bandwidth:bytes_per_second"}


def test_state_codes_are_the_kernels() -> None:
    """The recorded number of each state is VFIO_DEVICE_STATE_* of <linux/vfio.h>."""
    expr = records()["device:vfu_migration_state:code"]
    for state in DeviceState:
        assert f'{{state="{state.name}"}} * {int(state)}\n' in expr
    assert expr.count("state=") == len(DeviceState)


def test_every_alert_says_what_to_do() -> None:
    """Each has a severity and three texts; the last says what to do, and names its heading on the page.

    No link: whoever gets an alert has no checkout, and a relative one leads nowhere.
    """
    headings = {
        line.removeprefix("### ").strip().lower()
        for line in (DEPLOY.parent / "docs/monitoring.md").read_text().splitlines()
        if line.startswith("### ")
    }
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "todo"}
        assert rule["annotations"]["todo"].endswith(f" More: vfu-dev docs monitoring, {name}.")
        assert len(rule["annotations"]["todo"]) > 100
        assert name.lower() in headings
