#!/usr/bin/env python3
"""Writes dashboards/precopy-convergence.json; a test sees that it was run.

Each panel is one call in migration_rows.py or server_rows.py: title, what it tells, the queries, the unit.
States come from `vfu_dev.uapi`, limits from Prometheus' rules/limits.yml, so that nothing is said twice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from migration_rows import convergence, now, outcomes
from panels import DATASOURCE, Json, Layout
from queries import DOWNTIME_LIMIT, MAX_BANDWIDTH
from server_rows import guest, servers

DASHBOARD = Path(__file__).parent / "dashboards" / "precopy-convergence.json"

UID = "vfu-precopy"
SCHEMA_VERSION = 38  # Grafana 10; later ones read it and convert


def variables() -> list[Json]:
    """Return what can be chosen at the top."""

    def textbox(name: str, label: str, value: str, description: str) -> Json:
        chosen = {"text": value, "value": value, "selected": True}
        head = {"type": "textbox", "name": name, "label": label, "description": description}
        return head | {"query": value, "current": chosen, "options": [chosen]}

    return [
        {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"},
        {
            "type": "query",
            "name": "device",
            "label": "Device",
            "datasource": DATASOURCE,
            "query": "label_values(vfu_migration_state, device)",
            "refresh": 2,  # whenever the time range changes: devices come and go
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"], "selected": True},
        },
        textbox("downtime_limit", "Downtime limit (s)", DOWNTIME_LIMIT, "QEMU's downtime-limit, in seconds"),
        textbox("max_bandwidth", "Max. bandwidth (B/s)", MAX_BANDWIDTH, "QEMU's max-bandwidth, bytes/second"),
    ]


def dashboard() -> Json:
    """Return the whole dashboard."""
    page = Layout()
    for part in (now, convergence, guest, outcomes, servers):
        part(page)
    return {
        "uid": UID,
        "title": "Pre-copy convergence",
        "description": "Does the migration of a device converge, why not, and how long is the downtime?",
        "tags": ["vfu-dev", "migration"],
        "editable": True,
        "graphTooltip": 1,  # one cross-hair through all panels
        "schemaVersion": SCHEMA_VERSION,
        "refresh": "5s",
        "time": {"from": "now-5m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "panels": page.panels,
    }


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> int:
    """Write the file, or with --check say by the exit status whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the file is old")
    if parser.parse_args().check:
        return int(DASHBOARD.read_text() != text())
    DASHBOARD.write_text(text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
