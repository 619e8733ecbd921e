"""Scenarios with real QEMU: every shipped one in its short form, interruptions, and moves that go wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from schemakit import conforms
from serverkit import run_vfu_dev

from vfu_dev.errors import ConfigError
from vfu_dev.report.series import write_series
from vfu_dev.series.rows import COMPLETED, NOT_CONVERGED, read_rows
from vfu_dev.series.run import Artifacts, run_scenario
from vfu_dev.series.scenario import Scenario, parse, read_scenario, shipped
from vfu_dev.series.shuttle import KEPT_FAILURES, RESTARTS

SMALL = """
title = "two rates"
[device]
memory = "256K"
[load]
pattern = "uniform"
[qemu]
avail-switchover-bandwidth = "512K"
[run]
moves = 2
warmup = 0.1
verify = "digests"
[sweep]
"load.dirty-rate" = ["50p", "100p"]
"""


@pytest.fixture
def artifacts(qemu: Path, library: Path, guest_image: Path) -> Artifacts:
    """What a run needs, built."""
    return Artifacts(qemu, library, guest_image)


# The map has a test of its own, which looks at its border.
@pytest.mark.parametrize("name", [name for name in shipped() if name != "convergence-map"])
def test_shipped_scenario_in_its_short_form(name: str, artifacts: Artifacts, tmp_path: Path) -> None:
    """Every move does what the scenario expects, and the folder has all it should.

    What a scenario checks is downtimes, which are measured on a machine that does nothing else.
    """
    scenario = replace(read_scenario(name), checks=())
    out = tmp_path / name
    summary = run_scenario(scenario, out, short=True, artifacts=artifacts)
    assert summary["problems"] == []
    conforms("lab-run", summary)
    rows = read_rows(out / "moves.csv")
    assert len(rows) == sum(point["run.moves"] for point in scenario.short_points)
    for row in rows:
        if row.status == COMPLETED:
            assert row.digest_match
            assert row.metrics["downtime_ms"] <= row.metrics["total_ms"]
        else:
            # The numbers that decide are kept: more is written than the link takes.
            assert row.status == NOT_CONVERGED
            assert row.metrics["dirty_rate"] > row.metrics["transfer_rate"] > 0
    for point in summary["points"]:
        if point["settings"]["qemu.policy"]:
            assert point["metrics"]["policy_steps"]["min"] >= 1, "it converged without the policy"
        if point["settings"]["run.verify"] == "guest":
            assert point["guest"]["verified"]
            assert point["guest"]["generation"] == point["moves"]
    assert {"moves.csv", "summary.json", "scenario.toml", "points", "form.json"} == {
        path.name for path in out.iterdir()
    }
    page = write_series(out)
    assert page.read_text().count("<svg") >= bool(summary["fewest_moves"])


def test_a_run_is_started_anew(artifacts: Artifacts, tmp_path: Path) -> None:
    """After an edit with `force`, before the first move without; nobody else's files are deleted."""
    out = tmp_path / "out"

    def small(moves: int, more: str = "") -> Scenario:
        changes = {"run.moves": moves, "load.dirty-rate": "50p"}
        return parse(SMALL + more, "small", changes=changes)

    def cut_off(what: str, data: dict[str, Any]) -> None:
        if what == "point":
            raise CutOffError

    with pytest.raises(CutOffError):
        run_scenario(small(1), out, cut_off, artifacts=artifacts)
    assert (out / "form.json").exists()
    assert run_scenario(small(1), out, artifacts=artifacts)["ok"]
    edited = small(1, "# edited")
    for how in ({}, {"resume": True}):
        with pytest.raises(ConfigError, match="--force starts anew"):
            run_scenario(edited, out, artifacts=artifacts, **how)
    assert run_scenario(edited, out, artifacts=artifacts, force=True)["ok"]
    assert (out / "scenario.toml").read_text().endswith("# edited")
    other = tmp_path / "other"
    other.mkdir()
    (other / "scenario.toml").write_text("somebody's")
    with pytest.raises(ConfigError):
        run_scenario(edited, other, artifacts=artifacts, force=True)
    assert [path.name for path in other.iterdir()] == ["scenario.toml"]


class CutOffError(Exception):
    """Stands for Ctrl-C, at a moment of the test's choosing."""


def test_an_interrupted_run_goes_on_where_it_was(artifacts: Artifacts, tmp_path: Path) -> None:
    """Finished points are kept as they are, the one that was cut off is done again, nothing is missing."""
    scenario = parse(SMALL, "small")
    out = tmp_path / "out"
    seen: list[tuple[str, int]] = []

    def interrupt(what: str, data: dict[str, Any]) -> None:
        if what == "move":
            seen.append((data["point"], data["row"].move))
            if seen[-1] == ("dirty-rate=100p", 1):
                raise CutOffError

    with pytest.raises(CutOffError):
        run_scenario(scenario, out, interrupt, artifacts=artifacts)
    before = read_rows(out / "points" / "dirty-rate=50p.csv")
    assert not (out / "summary.json").exists()
    with pytest.raises(ConfigError, match="--resume"):
        run_scenario(scenario, out, artifacts=artifacts)
    with pytest.raises(ConfigError, match=r"another run, with other scenario\.toml"):
        run_scenario(parse(SMALL + "# changed", "small"), out, resume=True, artifacts=artifacts)
    again: list[str] = []
    summary = run_scenario(
        scenario,
        out,
        lambda what, data: again.append(data["point"]) if what == "move" else None,
        resume=True,
        artifacts=artifacts,
    )
    assert again == ["dirty-rate=100p", "dirty-rate=100p"]
    assert summary["ok"]
    rows = read_rows(out / "moves.csv")
    assert rows[:2] == before
    assert [(row.point, row.move) for row in rows] == [
        ("dirty-rate=50p", 1), ("dirty-rate=50p", 2), ("dirty-rate=100p", 1), ("dirty-rate=100p", 2)
    ]  # fmt: skip


def test_moves_that_fail_are_told_and_their_logs_bounded(artifacts: Artifacts, tmp_path: Path) -> None:
    """A destination that refuses data: each move is a row that says so, and the point is given up."""
    text = SMALL.replace("moves = 2", "moves = 9") + '[faults]\ndestination = ["op=mig-write,error=EIO"]\n'
    scenario: Scenario = parse(text, "broken")
    summary = run_scenario(scenario, tmp_path / "out", artifacts=artifacts)
    assert not summary["ok"]
    for point in summary["points"]:
        assert point["statuses"] == {"failed": RESTARTS + 1}
        assert point["metrics"].keys().isdisjoint({"downtime_ms"})
        assert any("given up" in text for text in point["problems"])
    failures = sorted((tmp_path / "out" / "failures").iterdir())
    assert len(failures) == KEPT_FAILURES
    assert any(
        "EIO" in log.read_text() or "nput/output" in log.read_text() for log in failures[0].glob("*.log")
    )
    assert not (tmp_path / "out" / "logs").exists()
    json.dumps(summary)


def test_moves_that_do_not_keep_to_their_profile_are_named(artifacts: Artifacts, tmp_path: Path) -> None:
    """The device's own state needs more than the profile has, in each move: exit status 3."""
    name, scenario = tmp_path / "small.toml", tmp_path / "kept.toml"
    name.write_text(
        'version = 1\nname = "small"\norigin = "made-up"\n[initial]\nbytes = { assumed = 64 }\n'
        '[stop_copy]\nkind = "constant"\nbytes = { assumed = 128 }\n'
    )
    scenario.write_text(
        f'title = "kept"\n[device]\nmemory = "64K"\nprofile = "{name}"\n[load]\npattern = "idle"\n'
        '[run]\nmoves = 2\nwarmup = 0.0\nverify = "digests"\n'
    )
    out = tmp_path / "out"
    done = run_vfu_dev("lab", "run", str(scenario), "--out", str(out), "--quiet")
    summary = json.loads((out / "kept" / "summary.json").read_text())
    conforms("lab-run", summary)
    assert (summary["ok"], done.returncode) == (True, 3), done.stderr
    (point,) = summary["points"]
    assert [one["move"] for one in point["not_kept"]] == [1, 2]
    for one in point["not_kept"]:
        assert "source did not keep the profile small: the device's own state needed" in one["text"]
    assert f"warning: {point['name']}: move 1: vfu0's source did not keep" in done.stderr
