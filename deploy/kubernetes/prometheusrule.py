#!/usr/bin/env python3
"""Writes prometheusrule.yaml, which hands the rules of deploy/prometheus to the Prometheus operator."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RULE = HERE / "prometheusrule.yaml"
RULES = HERE.parent / "prometheus" / "rules"

HEAD = (
    "# Written by prometheusrule.py from deploy/prometheus/rules, where it is explained; change it there.\n"
)


class _Dumper(yaml.SafeDumper):
    """Writes expressions of several lines as such."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def text() -> str:
    """Return the file's content."""
    groups: list[dict[str, Any]] = []
    for file in ("limits", "recording", "alerts"):
        groups += yaml.safe_load((RULES / f"{file}.yml").read_text())["groups"]
    labels = {"app.kubernetes.io/name": "vfu-dev"}
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vfu-dev", "labels": labels},
        # The operator's global interval is often 30 s; a migration is over by then.
        "spec": {"groups": [{"name": group["name"], "interval": "1s", **group} for group in groups]},
    }
    return HEAD + yaml.dump(resource, Dumper=_Dumper, sort_keys=False, width=90)


def main() -> int:
    """Write the file, or with --check say by the exit status whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the file is old")
    if parser.parse_args().check:
        return int(RULE.read_text() != text())
    RULE.write_text(text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
