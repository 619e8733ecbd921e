"""docs/many-machines.md: its commands word for word; its Slurm and CI jobs up to vfu-dev's command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pagekit import run_script
from schemakit import conforms
from serverkit import PATIENCE_SECONDS, run_vfu_dev

from vfu_dev.cli.lab_merge import merge
from vfu_dev.cli.lab_run import run
from vfu_dev.series.parts import Shard
from vfu_dev.series.rows import COMPLETED, read_rows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "many-machines.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def form_of(value: Any) -> Any:
    """Return the keys of a summary, without those of what a move happened to measure."""
    if isinstance(value, dict):
        return {key: form_of(one) for key, one in value.items() if key not in ("metrics", "command")}
    return [form_of(one) for one in value] if isinstance(value, list) else type(value)


def check_result(folder: Path) -> dict[str, Any]:
    """Return the summary of a whole result: each point once, each row with its machine."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    conforms("lab-run", summary)
    assert summary["problems"] == []
    rows = read_rows(folder / "moves.csv")
    assert [row.point for row in rows] == ["memory=256K", "memory=512K"]
    for row, point in zip(rows, summary["points"], strict=True):
        assert row.status == COMPLETED
        assert row.digest_match
        assert row.machine == point["machine"]["id"]
        assert point["model"]["converges"]
    assert "<svg" in (folder / "report.html").read_text()
    return summary


def test_the_page_word_for_word(qemu: Path, library: Path, tmp_path: Path) -> None:
    """Two shards and a cluster leave what a run on one machine leaves."""
    (tmp_path / "run").mkdir()
    said = run_script("\n".join(blocks("sh")), tmp_path, tmp_path / "run", 2 * PATIENCE_SECONDS)
    out = tmp_path / "run"
    done = run_vfu_dev("lab", "run", out / "sizes.toml", "--out", out / "local", "--quiet")
    assert done.returncode == 0, done.stderr
    merged, dask, local = (check_result(out / name / "sizes") for name in ("merged", "dask", "local"))
    assert [machine["id"] for machine in merged["machines"]] == ["left", "right"]
    assert "2 machines made these points" in merged["warnings"][0]
    assert dask["machines"][0]["id"] == local["machines"][0]["id"]
    assert form_of(dask) == form_of(local)
    assert form_of(merged | {"machines": merged["machines"][:1], "warnings": []}) == form_of(local)
    (refusal,) = re.findall(r"^vfu-dev: .*--across-machines.*$", said, re.MULTILINE)
    assert "made by left" in refusal
    assert "note: memory=512K: made by right" in said


def test_without_dask_the_block_ends(tmp_path: Path) -> None:
    """It shows what the scheduler said, and `lab run` says what it lacks; nothing waits for a file."""
    (block,) = (one for one in blocks("sh") if "dask scheduler" in one)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program = bin_ / "vfu-dev"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vfu_dev "$@"\n')
    program.chmod(0o755)
    (tmp_path / "sizes.toml").write_text(blocks("sh")[0].partition("EOF'\n")[2].partition("EOF\n")[0])
    environment = os.environ | {"PATH": f"{bin_}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    assert shutil.which("dask", path=environment["PATH"]) is None
    done = subprocess.run(
        ["bash", "-c", block.partition("kill $(jobs -p)")[0]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode not in (0, 127), done.stderr
    assert "dask: command not found" in done.stdout
    assert "cluster.json" in done.stderr


@pytest.fixture
def spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `vfu-dev` that only writes down its arguments, one a line; returns its folder."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "vfu-dev"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "" >> {tmp_path / "arguments"}\n')
    program.chmod(0o755)
    return tmp_path


def parsed(script: str, folder: Path, **environment: str) -> dict[str, Any]:
    """Return the parameters of the `vfu-dev lab` command that a shell script comes to."""
    (folder / "arguments").unlink(missing_ok=True)
    path = f"{folder}:/usr/bin:/bin"
    subprocess.run(["bash", "-ec", script], env={"PATH": path, **environment}, cwd=folder, check=True)
    ((lab, name, *arguments),) = (
        part.split("\n") for part in (folder / "arguments").read_text().strip().split("\n\n")
    )
    assert lab == "lab"
    return {"run": run, "merge": merge}[name].make_context(name, arguments).params


def test_the_slurm_script(spoken: Path) -> None:
    """All tasks of the array together are the run, each with an --out of its own."""
    (script,) = blocks("bash")
    first, last = map(int, re.findall(r"--array=(\d+)-(\d+)", script)[0])
    count = last - first + 1
    found = [
        parsed(script, spoken, SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=str(count))
        for task in range(first, last + 1)
    ]
    shards = [Shard.parse(one["shard_text"]) for one in found]
    assert shards == [Shard(number, count) for number in range(1, count + 1)]
    assert len({one["out"] for one in found}) == count
    assert all(one["resume"] for one in found)


def test_the_matrix(spoken: Path) -> None:
    """The same, and the merge takes what the artifacts' folders are called."""
    (text,) = blocks("yaml")
    jobs = yaml.safe_load(text)["jobs"]
    numbers = jobs["shard"]["strategy"]["matrix"]["shard"]
    command, upload = jobs["shard"]["steps"]
    shards = [
        Shard.parse(parsed(command["run"].replace("${{ matrix.shard }}", str(number)), spoken)["shard_text"])
        for number in numbers
    ]
    assert shards == [Shard(number, len(numbers)) for number in range(1, len(numbers) + 1)]
    download, join = jobs["merge"]["steps"]
    assert jobs["merge"]["needs"] == "shard"
    for number in numbers:
        name = upload["with"]["name"].replace("${{ matrix.shard }}", str(number))
        (spoken / download["with"]["path"] / name).mkdir(parents=True)
    assert len(parsed(join["run"], spoken)["parts"]) == len(numbers)
