"""One sweep on several machines: a Dask cluster whose workers die, are refused and are interrupted.

A machine is a label here: all workers are on this one, each with a `VFU_DEV_MACHINE` of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import LocalCluster
from serverkit import PATIENCE_SECONDS, VFU_DEV, wait_until

import vfu_dev
from vfu_dev.machine import LABEL
from vfu_dev.series.rows import COMPLETED, read_rows

# Without a load: a machine that is too busy for one would change the exit status.
SWEEP = """
title = "two sizes"
[run]
moves = 1
warmup = 0.1
verify = "digests"
[sweep]
"device.memory" = ["256K", "512K"]
"""
POINTS = ["memory=256K", "memory=512K"]
ROOT = Path(vfu_dev.__file__).parents[1]


@contextmanager
def dask_worker(address: str, folder: Path, machine: str, **environment: str) -> Iterator[subprocess.Popen]:
    """Start `dask worker` in a process of its own, which ends without a chance to say so."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), LABEL: machine} | environment
    command = [sys.executable, "-m", "dask", "worker", address, "--nthreads", "1", "--no-nanny"]
    command += ["--no-dashboard", "--local-directory", str(folder)]
    with (folder / f"{machine}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def lab_run(folder: Path, address: str, *more: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Run the sweep on the cluster; yields the process and the file with its progress."""
    said = folder / f"progress-{len(list(folder.glob('progress-*')))}"
    command = [*VFU_DEV, "lab", "run", folder / "sweep.toml", "--dask", address, "--out", folder / "out"]
    with said.open("w") as file:
        process = subprocess.Popen([*command, *more], stderr=file)
        try:
            yield process, said
        finally:
            process.kill()
            process.wait()


def jobs() -> list[str]:
    """Return the command lines of the processes here that make a group of points."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
        except OSError:
            continue
        if "vfu_dev.series.job" in line:
            lines.append(line)
    return lines


def test_a_cluster_that_is_interrupted_and_loses_a_worker(
    qemu: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost but the points under way, which are made once more; unfit workers make none.

    The first machine is killed while it makes a point; another joins, and makes that and the rest.
    """
    (tmp_path / "sweep.toml").write_text(SWEEP)
    other = tmp_path / "other" / "vfu_dev"
    shutil.copytree(ROOT / "vfu_dev", other, ignore=shutil.ignore_patterns("__pycache__"))
    (other.parent / "native").symlink_to(ROOT / "native")
    init = other / "__init__.py"
    init.write_text(init.read_text().replace(f'"{vfu_dev.__version__}"', '"0.0.9"'))
    monkeypatch.setenv(LABEL, "joins")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        dask_worker(cluster.scheduler_address, tmp_path, "old", PYTHONPATH=str(other.parent)),
        dask_worker(cluster.scheduler_address, tmp_path, "bare", VFU_DEV_QEMU="/nowhere/qemu"),
        dask_worker(cluster.scheduler_address, tmp_path, "dies") as dies,
    ):
        address = cluster.scheduler_address
        wait_until(lambda: len(cluster.scheduler.workers) == 3, "three workers")

        with lab_run(tmp_path, address) as (run, progress):
            wait_until(
                lambda: progress.read_text().count("sweep [") == 2 or run.poll() is not None, "two points"
            )
            run.send_signal(signal.SIGINT)
            assert run.wait(PATIENCE_SECONDS) == 130, progress.read_text()
        said = progress.read_text()
        assert "Traceback" not in said
        assert "--resume" in said
        assert "is refused: other versions: vfu-dev (0.0.9 instead of" in said
        assert "/nowhere/qemu" in said
        wait_until(lambda: not jobs(), "the end of the point that was under way")
        finished = {path.name: path.read_text() for path in (tmp_path / "out/sweep/points").glob("*.json")}
        assert list(finished) == [f"{POINTS[0]}.json"]

        with lab_run(tmp_path, address, "--resume") as (run, progress):
            wait_until(lambda: "sweep [" in progress.read_text() or run.poll() is not None, "a point")
            dies.kill()
            cluster.scale(1)
            assert run.wait(PATIENCE_SECONDS) == 0, progress.read_text()
        assert "once more from its beginning" in progress.read_text()
    summary = json.loads((tmp_path / "out/sweep/summary.json").read_text())
    assert summary["problems"] == []
    rows = read_rows(tmp_path / "out/sweep/moves.csv")
    assert [(row.point, row.status, row.machine) for row in rows] == [
        (POINTS[0], COMPLETED, "dies"), (POINTS[1], COMPLETED, "joins")
    ]  # fmt: skip
    assert [machine["id"] for machine in summary["machines"]] == ["dies", "joins"]
    for name, entry in finished.items():
        assert (tmp_path / "out/sweep/points" / name).read_text() == entry
