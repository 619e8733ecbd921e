"""The model beside a real QEMU, far from the border on either side."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from schemakit import conforms

from vfu_dev.cli import cli
from vfu_dev.series.prediction import compare
from vfu_dev.series.run import Artifacts, run_scenario
from vfu_dev.series.scenario import SHIPPED, parse

LIMIT = '"run.timeout" = 4'


def test_the_map_in_its_short_form_is_as_the_model_says(qemu: Path, library: Path, tmp_path: Path) -> None:
    """A quarter of the link converges, four times the link does not; the command draws and says so.

    A busy machine may have to be given longer for the first than the scenario does.
    """
    text = (SHIPPED / "convergence-map.toml").read_text()
    assert text.count(LIMIT) == 1
    for seconds in (4, 16, 64):
        folder = tmp_path / f"map{seconds}"
        scenario = parse(text.replace(LIMIT, f'"run.timeout" = {seconds}'), "convergence-map")
        run_scenario(scenario, folder, short=True, artifacts=Artifacts(qemu, library, None))
        slow, fast = compare(folder)
        if slow.converged:
            break
    assert (slow.converged, fast.converged) == (1.0, 0.0)
    assert slow.agrees
    assert fast.agrees
    assert slow.measured["total_ms"] > 0
    picture = tmp_path / "map.png"
    arguments = ["lab", "model", "--against", str(folder), "--map", str(picture)]
    told = CliRunner().invoke(cli, arguments)
    assert told.exit_code == 0, told.output
    assert "2 of 2 points as the model says" in told.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = CliRunner().invoke(cli, ["lab", "model", "--against", str(folder), "--json"])
    conforms("lab-model-against", json.loads(told.stdout))
