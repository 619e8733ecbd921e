"""Percentiles, differences, checks, and result folders that are compared."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from serverkit import run_vfu_dev

from vfu_dev.cli.lab import command
from vfu_dev.errors import ConfigError
from vfu_dev.report.series import markdown, write_series
from vfu_dev.series.artifacts import own_versions
from vfu_dev.series.checks import Check
from vfu_dev.series.compare import compare
from vfu_dev.series.rows import Row, read_rows, values_of, write_rows
from vfu_dev.series.scenario import parse
from vfu_dev.series.statistics import difference, percentiles
from vfu_dev.series.summary import machine, point_summary, reached, summarise, write_json

SCENARIO = parse('title = "T"\nabout = "A"\n[variants.a]\n[variants.b]\nqemu.pre-copy = false\n', "t")


def row(point: str, move: int, downtime: float, status: str = "completed") -> Row:
    """Return a row with three figures."""
    metrics = {"downtime_ms": downtime, "total_ms": 10 * downtime, "passes": 2.0}
    return Row(point, move, 1.5e9 + move, status, metrics, True, "aa bb", 'text, with "comma"')


def result(folder: Path, factor: float, count: int = 70) -> Path:
    """Write a result folder: variant a around 10 ms, b around 20 ms, times `factor`."""
    random = np.random.default_rng(int(factor * 100))
    rows = [
        row(name, move + 1, factor * base * float(random.uniform(0.9, 1.1)))
        for name, base in (("a", 10), ("b", 20))
        for move in range(count)
    ]
    points = [
        {**point.to_dict(), **point_summary([one for one in rows if one.point == point.name]), "problems": []}
        for point in SCENARIO.points
    ]
    folder.mkdir()
    facts = {
        "versions": {**own_versions(), "qemu": "10.2.2"},
        "machine": machine(),
        "command": ["x"],
        "changes": {},
    }
    facts |= {"started": 1.0, "ended": 2.0}
    write_rows(folder / "moves.csv", rows)
    write_json(folder / "summary.json", summarise(SCENARIO, False, points, rows, facts))
    (folder / "scenario.toml").write_text(SCENARIO.text)
    return folder


def test_percentiles_are_numpys() -> None:
    """25th, 50th and 95th of known values; no value has no percentile."""
    found = percentiles([float(value) for value in range(101)])
    assert (found["p25"], found["p50"], found["p95"], found["n"]) == (25.0, 50.0, 95.0, 101)
    assert percentiles([]) == {"n": 0}


def test_difference_is_told_only_where_there_is_one() -> None:
    """Sets of one distribution are not told apart, shifted ones are, the interval holds the true ratio."""
    random = np.random.default_rng(7)
    first = list(random.normal(100, 10, 80))
    alike = difference(first, list(random.normal(100, 10, 80)))
    assert not alike.significant
    assert alike.low is not None
    assert alike.high is not None
    assert alike.low < 1 < alike.high
    other = difference(first, list(random.normal(130, 10, 80)))
    assert other.significant
    assert other.low is not None
    assert other.high is not None
    assert 1.2 < other.low < 1.3 < other.high < 1.4
    assert "too few" in difference([1.0], [2.0]).text
    assert difference([3.0, 3.0], [3.0, 3.0]).p_value == 1.0


def test_a_load_that_fell_short_is_a_warning(tmp_path: Path) -> None:
    """94 % of the asked rate is told, 96 % is not; where nobody knows the rate nothing is."""
    points = [
        {**point.to_dict(), **point_summary([]), "problems": [], "rate": reached(None, load)}
        for point, load in zip(
            SCENARIO.points,
            ({"asked_rate_bytes": 100, "reached_rate_bytes": share} for share in (94, 96)),
            strict=True,
        )
    ]
    assert summarise(SCENARIO, False, points, [], {})["warnings"] == [
        "a: wrote 94 B/s, 100 B/s were asked for"
    ]
    assert reached(None, None) is None


@pytest.mark.parametrize(("late", "more"), [(0, None), (3, ""), (5, "; and 2 more")])
def test_moves_that_did_not_keep_to_their_profile_are_a_warning(late: int, more: str | None) -> None:
    """Three of a point are named, of the others the number is said."""
    lapses = [{"move": number, "text": f"text {number}"} for number in range(1, late + 1)]
    points = [
        {**point.to_dict(), **point_summary([]), "problems": [], "rate": None, "not_kept": not_kept}
        for point, not_kept in zip(SCENARIO.points, (lapses, []), strict=True)
    ]
    named = "a: move 1: text 1; move 2: text 2; move 3: text 3"
    warnings = summarise(SCENARIO, False, points, [], {})["warnings"]
    assert warnings == ([] if more is None else [named + more])


def test_rows_survive_the_file(tmp_path: Path) -> None:
    """A row read back is the row written; unknown figures stay unknown; only completed moves count."""
    rows = [
        row("p", 1, 12.25),
        Row("p", 2, 3.0, "not-converged", {"dirty_rate": 5.0}, text="dirty > transfer"),
    ]
    write_rows(tmp_path / "moves.csv", rows)
    assert read_rows(tmp_path / "moves.csv") == rows
    # As a spreadsheet writes it.
    (tmp_path / "moves.csv").write_bytes(codecs.BOM_UTF8 + (tmp_path / "moves.csv").read_bytes())
    assert read_rows(tmp_path / "moves.csv") == rows
    assert values_of([*rows, row("p", 3, 1.0, "failed")], "downtime_ms") == [12.25]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="not the moves"):
        read_rows(tmp_path / "other.csv")


def test_checks_hold_and_fail() -> None:
    """A ratio and a limit, held and broken; nothing measured is a failure."""
    rows = {"a": [row("a", 1, 10)], "b": [row("b", 1, 100)], None: [row("a", 1, 10), row("b", 1, 100)]}
    assert Check("downtime_ms", "a", "b", max_ratio=0.2).judge(rows)["ok"]
    assert not Check("downtime_ms", "b", "a", max_ratio=0.2).judge(rows)["ok"]
    assert Check("downtime_ms", None, min=50, percentile=100).judge(rows)["ok"]
    found = Check("stop_copy_ms", "a", max=1).judge(rows)
    assert not found["ok"]
    assert "nothing was measured" in found["text"]


def test_comparison_finds_what_became_slower(tmp_path: Path) -> None:
    """Half as slow again is found in every point, with its ratio; the same again is not."""
    before = result(tmp_path / "before", 1.0)
    slower = compare(before, result(tmp_path / "slower", 1.5), ["downtime_ms"])
    assert [entry["point"] for entry in slower["entries"]] == ["a", "b"]
    for entry in slower["entries"]:
        assert 1.4 < entry["ratios"]["p50"] < 1.6
        assert entry["significant"]
        assert 40 < entry["regression"] < 60
    assert slower["settings"] == {}
    again = compare(before, result(tmp_path / "again", 1.001), ["downtime_ms"])
    assert [entry["regression"] for entry in again["entries"]] == [None, None]


def test_comparison_tells_what_was_set_differently(tmp_path: Path) -> None:
    """Two folders whose points have the same name and other settings are compared with a note."""
    before, after = result(tmp_path / "before", 1.0), result(tmp_path / "after", 1.0)
    summary = json.loads((after / "summary.json").read_text())
    summary["points"][0]["settings"]["device.memory"] = 4096
    write_json(after / "summary.json", summary)
    assert compare(before, after)["settings"] == {"a": {"device.memory": [8 << 20, 4096]}}
    shown = CliRunner().invoke(command, ["compare", str(before), str(after)])
    assert "note: a: device.memory is 8388608 in the first, 4096 in the second" in shown.output


def test_comparison_command_ends_with_status_1_on_a_regression(tmp_path: Path) -> None:
    """--max-regression decides the exit status; without it a comparison is only shown, drawn and written."""
    before, after = result(tmp_path / "before", 1.0), result(tmp_path / "after", 1.5)
    plot, told = tmp_path / "plot.svg", tmp_path / "told.json"
    argv = ["compare", str(before), str(after), "--metric", "downtime_ms"]
    shown = CliRunner().invoke(command, [*argv, "--plot", str(plot), "--json", str(told)])
    assert shown.exit_code == 0
    assert "Mann-Whitney" in shown.output
    assert "<svg" in plot.read_text()
    assert json.loads(told.read_text())["kind"] == "lab-compare"
    assert CliRunner().invoke(command, [*argv, "--max-regression", "60"]).exit_code == 0
    refused = CliRunner().invoke(command, [*argv, "--max-regression", "20"])
    assert refused.exit_code == 1
    assert "REGRESSION: a: downtime_ms" in refused.output


def test_comparison_refuses_what_has_no_match(tmp_path: Path) -> None:
    """No common point, no result, unknown metric: each is said."""
    before = result(tmp_path / "before", 1.0)
    other = result(tmp_path / "other", 1.0)
    text = (other / "summary.json").read_text().replace('"name": "a"', '"name": "c"')
    (other / "summary.json").write_text(text.replace('"name": "b"', '"name": "d"'))
    moves = (other / "moves.csv").read_text().replace("\na,", "\nc,").replace("\nb,", "\nd,")
    (other / "moves.csv").write_text(moves)
    with pytest.raises(ConfigError, match="no point in common"):
        compare(before, other)
    with pytest.raises(ConfigError, match=r"summary\.json"):
        compare(before, tmp_path)
    (other / "summary.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"summary\.json: not JSON"):
        compare(before, other)
    with pytest.raises(ConfigError, match="expected one of downtime_ms"):
        compare(before, before, ["speed"])


def test_comparison_is_no_gate_without_data(tmp_path: Path) -> None:
    """Nothing to compare, or a metric that one side lacks, is status 1 and never "no regression"."""
    before = result(tmp_path / "before", 1.0)
    with (before / "moves.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    column = header.index("downtime_ms")

    def rewritten(change: Callable[[list[str]], list[str]]) -> str:
        out = io.StringIO()
        csv.writer(out).writerows([header, *(change(row) for row in rows)])
        return out.getvalue()

    cases = {
        "empty": ("", 1, "no completed move"),
        "header-only": (",".join(header) + "\n", 1, "no completed move"),
        "cut": (rewritten(lambda row: row[:3]), 2, "fewer cells"),
        "nan": (rewritten(lambda row: [*row[:column], "nan", *row[column + 1 :]]), 2, "nan"),
        "lacks": (rewritten(lambda row: [*row[:column], "", *row[column + 1 :]]), 1, "downtime_ms"),
    }
    for name, (text, status, words) in cases.items():
        after = result(tmp_path / name, 1.0)
        (after / "moves.csv").write_text(text)
        argv = ["lab", "compare", str(before), str(after), "--max-regression", "20"]
        done = run_vfu_dev(*argv)
        assert (name, done.returncode) == (name, status), done.stderr
        assert words in done.stderr


def test_page_and_table_of_a_result(tmp_path: Path) -> None:
    """One page without network, pictures as PNG and SVG, and a table for documents with n and the machine."""
    folder = result(tmp_path / "r", 1.0)
    page = write_series(folder).read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert (folder / "plots" / "downtime.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "plots" / "course.svg").read_text()
    table = markdown(json.loads((folder / "summary.json").read_text()))
    assert table.splitlines()[2].startswith("| a | 70 | ")
    # b is twice a, by construction.
    (said,) = [line for line in table.splitlines() if line.startswith("- downtime_ms, b over a")]
    assert "differ" in said
    assert 1.9 < float(said.partition("ratio ")[2].partition(",")[0]) < 2.1
    assert "cores" in table
