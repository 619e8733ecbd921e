"""docs/series.md says what the code does."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from vfu_dev.cli.lab import command
from vfu_dev.report.series import write_series
from vfu_dev.series.compare import compare
from vfu_dev.series.keys import KEYS, names
from vfu_dev.series.rows import METRICS
from vfu_dev.series.scenario import parse, read_scenario, shipped

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "series.md").read_text()
RESULTS_PAGE = (DOCS / "results.md").read_text() + (DOCS / "scale.md").read_text()
RESULTS = DOCS / "results"
FILES = (".csv", ".json", ".toml", ".html")


def test_every_key_is_in_the_table_with_its_default() -> None:
    """The table of keys has all of them, none that is not there, and the defaults of the schema."""
    rows = re.findall(r"^\| ((?:`[a-z]+\.[a-z-]+`(?:, )?)+) \|([^|]*)\|", PAGE, re.MULTILINE)
    documented = {key: default for keys, default in rows for key in re.findall(r"`([^`]+)`", keys)}
    documented = {key: default for key, default in documented.items() if not key.endswith(FILES)}
    assert set(documented) == set(names())
    for table, keys in KEYS.items():
        for key, entry in keys.items():
            default = documented[f"{table}.{key}"]
            if "," not in default and default.strip() and entry.default:
                assert entry.parse(_value(default.strip())) == entry.default, key


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else int(text) if text.isdigit() else text


def test_the_example_is_a_scenario() -> None:
    """The file on the page parses, with both variants and both values of the sweep."""
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    scenario = parse(example, "example")
    assert len(scenario.points) == 4
    assert scenario.checks


def test_named_columns_exist() -> None:
    """Every column that the page explains is one of moves.csv."""
    named = set(re.findall(r"`([a-z_]+_(?:ms|rate))`", PAGE))
    assert named
    assert named <= set(METRICS)


def test_options_of_the_page_exist() -> None:
    """Every option named on the page is in the help of a lab command."""
    runner = CliRunner()
    texts = [runner.invoke(command, [name, "--help"]).output for name in ("run", "compare", "migrate")]
    helped = set(re.findall(r"--[a-z][a-z-]+", " ".join(texts)))
    serve = {"--initial"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - serve <= helped


def test_results_are_of_shipped_scenarios_and_in_the_page() -> None:
    """Each folder of docs/results is a shipped scenario's, and results.md shows its table and picture."""
    folders = [folder for folder in RESULTS.iterdir() if (folder / "summary.json").exists()]
    assert {folder.name for folder in folders} <= set(shipped())
    assert folders
    for folder in folders:
        assert (folder / "moves.csv").exists()
        table = (folder / "table.md").read_text()
        assert table.strip() in RESULTS_PAGE, folder.name
        assert f"results/{folder.name}/downtime.png" in RESULTS_PAGE or "not-converged" in table
        assert read_scenario(folder.name).title in RESULTS_PAGE


def test_published_results_do_not_identify_a_machine() -> None:
    """Ids are those that `anonymous` gives, and a kernel is its version alone."""
    for path in (*RESULTS.glob("*/summary.json"), DOCS / "profile-results" / "results.json"):
        found = re.findall(r'"(id|kernel)": "(.*?)"', path.read_text())
        assert {key for key, _ in found} == {"id", "kernel"}
        for key, value in found:
            assert re.fullmatch({"id": r"machine-\d+", "kernel": r"[\d.]+"}[key], value), path
    for path in (*RESULTS.glob("*/moves.csv"), *(DOCS / "img").glob("*.csv")):
        with path.open() as file:
            assert {row["machine"] for row in csv.DictReader(file)} == {"machine-1"}


def test_the_pages_are_what_lies_beside_them() -> None:
    """Titles and descriptions are those of the runs: a shipped scenario may have changed since."""
    pages = runpy.run_path(str(RESULTS / "collect.py"))["pages"]()
    assert set(pages) == {"results.md", "scale.md"}
    for name, text in pages.items():
        assert (DOCS / name).read_text() == text, "python docs/results/collect.py FOLDER"


def test_points_of_the_results_are_called_as_they_are_now() -> None:
    """So that a run of today can be compared with them."""
    for folder in RESULTS.iterdir():
        if (folder / "summary.json").exists():
            names = [point["name"] for point in json.loads((folder / "summary.json").read_text())["points"]]
            assert names == [point.name for point in read_scenario(folder.name).points], folder.name


@pytest.mark.parametrize(("policy", "differs"), [([], False), (["seconds=1,downtime-limit=9"], True)])
def test_a_result_older_than_a_key_can_be_compared(tmp_path: Path, policy: list[str], differs: bool) -> None:
    """It is as if the key was empty: nothing differs, unless the newer run used it."""
    for name in ("older", "newer"):
        shutil.copytree(RESULTS / "idle", tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        settings = summary["points"][0]["settings"]
        assert settings.pop("qemu.policy") == []
        if name == "newer":
            settings["qemu.policy"] = policy
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    found = compare(tmp_path / "older", tmp_path / "newer")
    assert found["settings"] == ({"all": {"qemu.policy": [None, policy]}} if differs else {})


def test_the_page_of_a_result_can_be_made_again(tmp_path: Path) -> None:
    """Light and dark, with contents and captions; `steady` has a sweep."""
    folder = tmp_path / "steady"
    shutil.copytree(RESULTS / "steady", folder)
    page = write_series(folder).read_text()
    assert page.count('<svg role="img" aria-label=') == page.count("<svg") == 3
    assert page.count("<caption>") == page.count("<table")
    for identity in re.findall(r'<h2 id="([a-z]+)"', page):
        assert f'<li><a href="#{identity}">' in page
