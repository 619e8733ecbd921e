"""A policy in a real move: rules act in their order, QEMU obeys them, and report and metric show it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pagekit import ROOT, run_script
from schemakit import conforms
from serverkit import PATIENCE_SECONDS, run_vfu_dev

from vfu_dev.report.last_downtime import NAME
from vfu_dev.series.rows import COMPLETED, read_rows

PAGE = ROOT / "docs" / "policies.md"
# Of the page. Less than two pages of memory fit before the last step, all of the device after it.
RULES = ["passes=3,downtime-limit=2", "passes=3,seconds=0.5,downtime-limit=1050"]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, qemu: Path, library: Path) -> tuple[Path, str]:
    """Run the page's commands; return their folder and what they printed."""
    folder = tmp_path_factory.mktemp("policies")
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    # 3: the machine did not carry the whole load, which is not what this is about.
    lines = [f"{line} || test $? = 3" for line in block.replace("\\\n", "").splitlines()]
    return folder, run_script("\n".join(lines), folder, folder, 2 * PATIENCE_SECONDS)


def test_the_migration_ends_because_of_the_policy(said: tuple[Path, str]) -> None:
    """The threshold of each sample follows the rules; the limit at the end is that of the last one."""
    folder, printed = said
    out = folder / "out" / "policy"
    result = json.loads((folder / "move.json").read_text())
    conforms("lab-migrate", result)
    assert result["status"] == "completed"
    steps = result["policy"]
    assert [step["rule"] for step in steps] == RULES
    assert 3 <= steps[0]["passes"] <= steps[1]["passes"]
    assert steps[0]["seconds"] + 0.5 <= steps[1]["seconds"]
    assert all(step["remaining_bytes"] > 2 * 4096 for step in steps)
    assert result["qemu"]["downtime_limit_ms"] == 1050
    assert result["qemu"]["parameters"]["downtime_limit"] == 1050
    seen = set()
    for sample in result["samples"]:
        set_before = [step for step in steps if step["time"] < sample["time"]]
        limit = [1, 2, 1050][len(set_before)]
        assert sample["threshold_bytes"] == pytest.approx((8 << 20) * limit / 1000)
        seen.add(limit)
    assert seen >= {1, 2}  # each step was due to a sample of the limit before it
    assert "the policy set downtime-limit=1050" in printed
    page = (out / "report.html").read_text()
    assert "What the rules of the policy did" in page
    assert all(f"<code>{rule}</code>" in page for rule in RULES)
    assert page.count("downtime-limit=1050") > page.count(RULES[1])  # in the picture, too
    (line,) = [one for one in (out / "metrics.prom").read_text().splitlines() if one.startswith(NAME)]
    assert float(line.split()[-1]) * 1000 == pytest.approx(result["qemu"]["downtime_ms"])


def test_the_scenario_ends_because_of_the_policy(said: tuple[Path, str]) -> None:
    (move,) = read_rows(said[0] / "out" / "series" / "kubevirt-ramp" / "moves.csv")
    assert (move.status, move.digest_match) == (COMPLETED, True)
    assert move.metrics["policy_steps"] == 2
    assert move.metrics["downtime_limit_ms"] == 1050
    page = (said[0] / "out" / "series" / "kubevirt-ramp" / "report.html").read_text()
    assert "What the rules of the policy did in the last move of ramp" in page
    assert page.count("<code>downtime-limit=") == 2


def test_a_wrong_rule_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = run_vfu_dev("lab", "migrate", "--policy", "passes=3,downtime=2", "--out", tmp_path / "lab")
    assert done.returncode == 2
    assert "'downtime=2': expected KEY=VALUE" in done.stderr
    assert not (tmp_path / "lab").exists()
