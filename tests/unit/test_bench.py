"""`vfu-dev bench`: what its figures are made of, and that it runs; speed itself is no matter of tests."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from schemakit import conforms
from serverkit import runs, wait_until

from vfu_dev.bench import figures, limits, peers
from vfu_dev.bench.figures import Effort, Figure, figure, in_turns, percentiles
from vfu_dev.bench.front_ends import Machine
from vfu_dev.bench.limits import LIMITS, Limit
from vfu_dev.bench.machine import OtherWork
from vfu_dev.bench.peers import ARTIFACTS, Bench
from vfu_dev.bench.raw import RawClient
from vfu_dev.bench.run import CASES, FIGURES, possible
from vfu_dev.builds import BuildError, artifact
from vfu_dev.cli.bench import command
from vfu_dev.uapi import DeviceState
from vfu_dev.vm.monitor import Monitor

DOCUMENT = Path(__file__).parents[2] / "docs" / "bench.md"


def test_both_sides_are_first_in_turns() -> None:
    order: list[str] = []
    pairs = in_turns(4, lambda: order.append("ours") or 1, lambda: order.append("peer") or 2)  # type: ignore[func-returns-value]
    assert pairs == [(1, 2)] * 4
    assert order == ["ours", "peer", "peer", "ours"] * 2


class AnHourEarlier(Monitor):
    """A QEMU that resumes at once, and whose clock was set back since."""

    async def execute(self, command: str, **_: object) -> None:
        """Say that all has arrived."""
        assert command == "migrate-incoming"
        event = {"time": time.time() - 3600, "event": "MIGRATION", "data": {"status": "completed"}}
        self.events.append(event)


class Resuming(Machine):
    """With a QEMU that is none."""

    def __init__(self, qemu: Monitor) -> None:
        self.qemu = qemu  # type: ignore[assignment]


def test_a_clock_that_is_set_does_not_change_what_resuming_took(tmp_path: Path) -> None:
    """QEMU's events carry the time of day; how long it took is of one clock that nobody sets."""

    async def rate_of_a_resume() -> float:
        return await Resuming(AnHourEarlier("vm", tmp_path / "qmp")).resume("file:vm", 1 << 30)

    began = time.monotonic()
    rate = asyncio.run(rate_of_a_resume())
    assert rate >= 1024 / (time.monotonic() - began)


def test_memory_is_touched_before_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    monkeypatch.setattr(figures, "touch_memory", order.append)
    in_turns(2, lambda: order.append("ours"), lambda: order.append("peer"), touched_bytes=4096)
    assert order == [4096, "ours", "peer", 4096, "peer", "ours"]


def test_a_ratio_is_that_of_rounds_not_of_medians() -> None:
    """A round in which the machine was slow for both says as much as any other."""
    found = figure("mmio-read/p50", "us", [(10, 10), (40, 40), (22, 20)], "C server")
    assert (found.ours, found.peer, found.ratio) == (22, 20, 1.0)
    assert found.ratio_low <= found.ratio <= found.ratio_high


@pytest.mark.parametrize(
    ("name", "pairs", "kept"),
    [
        ("mmio-read/p50", [(9, 10)] * 5 + [(100, 10)] * 4, True),
        ("mmio-read/p50", [(9, 10)] * 4 + [(100, 10)] * 5, False),
        ("stream-in/rate", [(11, 10)] * 5 + [(0.1, 10)] * 4, True),
        ("stream-in/rate", [(11, 10)] * 4 + [(0.1, 10)] * 5, False),
    ],
)
def test_a_limit_is_kept_when_the_median_of_the_rounds_keeps_it(
    name: str, pairs: list[tuple[float, float]], kept: bool
) -> None:
    assert figure(name, "x", pairs, "peer").kept is kept


def test_percentiles_are_of_each_round_in_microseconds() -> None:
    slow = np.arange(1, 101) * 2000
    fast = np.arange(1, 101) * 1000
    half, most = percentiles("mmio-read", [(slow, fast)] * 3, "C server")
    assert (half.name, half.ours, half.ratio) == ("mmio-read/p50", pytest.approx(101), 2.0)
    assert most.name == "mmio-read/p99"
    assert most.peer == pytest.approx(99.01)


def test_the_document_names_every_figure_with_its_limit() -> None:
    rows = dict(re.findall(r"^\| `([\w/-]+)` \|.*\| [<>]= ([\d.]+) \|$", DOCUMENT.read_text(), re.MULTILINE))
    assert {name: float(limit) for name, limit in rows.items()} == {
        name: limit.ratio for name, limit in LIMITS.items()
    }
    for case in CASES:
        assert f"`{case}`" in DOCUMENT.read_text()


@pytest.fixture
def servers() -> None:
    """Have what the cases start."""
    try:
        for name in ARTIFACTS:
            artifact(name, build=True)
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("servers")
def test_every_case_measures_what_has_a_limit(tmp_path: Path) -> None:
    """All figures come, each positive, as JSON and as text; nothing is left behind."""
    file = tmp_path / "bench.json"
    done = CliRunner().invoke(command, ["--quick", "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    conforms("bench", result)
    figures = {one["name"]: one for one in result["figures"]}
    assert set(figures) == set(LIMITS)
    assert result["failures"] == []
    assert all(one["ours"] > 0 and one["peer"] > 0 and one["ratio"] > 0 for one in figures.values())
    assert result["machine"]["cpus"] >= 1
    assert all(name in done.output for name in LIMITS)


@pytest.mark.usefixtures("servers")
def test_a_case_that_fails_loses_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server ends behind its first figure: that figure, the failure and the next case are reported."""

    def killed(bench: Bench, effort: Effort) -> Iterator[Figure]:
        yield figure("stream-out-trap/rate", "MiB/s", [(1.0, 1.0)] * effort.rounds, "nobody")
        server = bench.ours(effort.memory_mib)
        with RawClient(server.socket) as client:
            server.process.end()
            client.set_state(DeviceState.PRE_COPY)
        yield figure("stream-out-mmap/rate", "MiB/s", [(1.0, 1.0)] * effort.rounds, "nobody")

    monkeypatch.setitem(CASES, "stream-out", killed)
    monkeypatch.setattr(OtherWork, "share", lambda _: 0.0)
    file = tmp_path / "bench.json"
    done = CliRunner().invoke(
        command, ["stream-out", "scan", "--quick", "--json", str(file)], catch_exceptions=False
    )
    assert done.exit_code == 1, done.output
    result = json.loads(file.read_text())
    conforms("bench", result)
    names = [one["name"] for one in result["figures"]]
    assert names == ["stream-out-trap/rate", "scan-mmap/gib", "scan-trap/gib"]
    (failure,) = result["failures"]
    assert (failure["case"], failure["missing"]) == ("stream-out", 1)
    assert "the measuring client ended" in failure["error"]
    assert not result["kept"]
    assert re.search(r"^stream-out +FAILED: the measuring client ended", done.output, re.MULTILINE)


@pytest.mark.usefixtures("servers")
def test_a_stopped_device_moves_though_its_qemu_sends_ram_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine: the device's state is more than QEMU could move within downtime-limit."""
    names, left_out = possible()
    if "qemu-downtime" not in names:
        pytest.skip(left_out)
    start = Machine.start

    async def slow(machine: Machine) -> None:
        await start(machine)
        # It holds until the migration completes. Each of 8192 empty pages of RAM takes 9 bytes: 0.7 s in all.
        # At 1000 bytes a second QEMU completed whatever the device had, after up to 36 s.
        await machine.qemu.execute("migrate-set-parameters", max_bandwidth=100_000)

    monkeypatch.setattr(Machine, "start", slow)
    with peers.bench() as bench:
        (took,) = CASES["qemu-downtime"](bench, Effort(rounds=1, calls=1, seconds=0, memory_mib=1))
    # It was slow: QEMU, whose clock counts whole milliseconds, asks for its bandwidth every 100.
    assert min(took.ours, took.peer) > 99


@pytest.mark.parametrize(
    ("ratio", "other_work", "options", "status"),
    [
        (1e9, 0.0, [], 0),
        (0.0, 0.0, [], 0),
        (1e9, 0.0, ["--check"], 0),
        (0.0, 0.0, ["--check"], 1),
        (0.0, 0.2, ["--check"], 3),
        (1e9, 0.2, ["--check"], 3),
        (1e9, 0.2, [], 0),
        (1e9, 0.0, ["--check", "--with-busy-core"], 3),
    ],
)
def test_check_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, ratio: float, other_work: float, options: list[str], status: int
) -> None:
    """With --check a limit that was not kept ends in 1, and a machine that had other work in 3."""
    for name in ("scan-mmap/gib", "scan-trap/gib"):
        monkeypatch.setitem(limits.LIMITS, name, Limit(ratio))
    monkeypatch.setattr(OtherWork, "share", lambda _: other_work)
    done = CliRunner().invoke(command, ["scan", "--quick", *options], catch_exceptions=False)
    assert done.exit_code == status
    assert ("BROKEN" in done.output) == (ratio == 0.0)
    assert ("not judged" in done.output) == (other_work > 0.1 or "--with-busy-core" in options)


def test_others_are_not_who_is_measured() -> None:
    """A process that the bench starts, and its own time, are no other work; one that somebody else has is."""
    others = OtherWork()
    spin = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    ours = others.busy_seconds()
    adopted = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c '{spin}' & echo $!"], stdout=subprocess.PIPE
    )
    pid = int(adopted.communicate()[0])  # a child of the shell that has ended, not of this process
    wait_until(lambda: not runs(pid), "the adopted process has ended")
    assert others.busy_seconds() - ours > 0.3


def test_each_case_has_the_number_of_figures_that_the_time_left_is_computed_with() -> None:
    assert list(FIGURES) == list(CASES)
    assert sum(FIGURES.values()) == len(LIMITS)
