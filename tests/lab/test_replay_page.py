"""docs/replay.md, run as it stands: QEMU moves what the profiles say, and their times and features hold."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pagekit import ROOT, made_folder, run_script, shell_blocks
from replaykit import Case
from serverkit import PATIENCE_SECONDS

from vfu_dev.profile import Profile
from vfu_dev.profile.shipped import shipped

PAGE = ROOT / "docs" / "replay.md"
BLOCKS = shell_blocks(PAGE)
# What each run of the page replays: the folder of its report, the profile, and its --scale.
RUNS = {"igb": Case("igb-4k", 1), "mlx5": Case("mlx5-300mb", 20)}


@dataclass(frozen=True)
class Run:
    """One `lab migrate` of the page."""

    profile: Profile
    report: dict[str, Any]

    @property
    def replays(self) -> list[dict[str, Any]]:
        """What the source's and the destination's server say of the replay."""
        (device,) = self.report["devices"]
        return [device["replay_source"], device["replay_destination"]]


@pytest.fixture(scope="module")
def page(qemu: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """What the page's commands said, and the folder that they made."""
    folder = tmp_path_factory.mktemp("page")
    said = run_script("\n".join(BLOCKS), folder, folder, 2 * PATIENCE_SECONDS)
    made = made_folder(said)
    yield said, made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, page: tuple[str, Path]) -> Run:
    """Each run of the page."""
    report = json.loads((page[1] / request.param / "report.json").read_text())
    return Run(RUNS[request.param].profile, report)


def test_the_page_has_these_runs() -> None:
    """A guard against a change of the page that would test nothing."""
    text = " ".join("\n".join(BLOCKS).replace("\\\n", " ").split())
    assert text.count("vfu-dev lab migrate --profile") == len(RUNS)
    for folder, case in RUNS.items():
        option = f" --scale {case.scale}" if case.scale > 1 else ""
        assert re.search(rf'--profile {case.name}{option} .*--out "\$RUN/{folder}"', text)


def test_the_profiles_bytes_arrive(run: Run) -> None:
    """To the byte, as QEMU counts them: more only where the device's own state has no room in STOP_COPY."""
    report, profile = run.report, run.profile
    assert (report["status"], report["moved"], report["problems"]) == ("completed", True, [])
    assert profile.initial.bytes is not None
    assert profile.stop_copy.bytes is not None
    (device,) = report["devices"]
    source, destination = run.replays
    initial, read = profile.initial.bytes.value, device["precopy_bytes"]
    assert device["save"]["initial_bytes"] == initial
    # A QEMU that waits for no ack may stop the guest before it reads any: RAM comes first.
    assert read == initial or (read == 0 and not report["settings"]["switchover_ack"])
    assert device["stop_copy_bytes"] == profile.stop_copy.bytes.value + source["overshoot_bytes"]
    assert report["qemu"]["vfio_bytes"] == device["received_bytes"] == read + device["stop_copy_bytes"]
    assert destination["overshoot_bytes"] == 0


def test_the_guest_goes_on_with_its_device(run: Run) -> None:
    """It wrote before and after the move, and finds what it wrote."""
    (device,) = run.report["devices"]
    assert device["digest_match"] is True
    guest = run.report["guest"]
    assert (guest["verified"], guest["compared_bytes"], guest["mismatched_bytes"]) == (True, 64 << 10, 0)
    assert guest["writes"] > 0


def test_features_are_the_profiles(run: Run) -> None:
    assert run.profile.features.p2p is not None
    states = {*run.report["qemu"]["states_source"], *run.report["qemu"]["states_destination"]}
    assert {"PRE_COPY", "STOP_COPY", "RESUMING"} <= states
    with_p2p = {"PRE_COPY_P2P", "RUNNING_P2P"}
    assert states & with_p2p == (with_p2p if run.profile.features.p2p.value else set())


def test_a_profile_that_was_not_kept_is_warned_of_and_exits_with_3(page: tuple[str, Path]) -> None:
    said, folder = page
    broken = 0
    for name in RUNS:
        report = json.loads((folder / name / "report.json").read_text())
        (device,) = report["devices"]
        kept = [device[f"replay_{side}"]["kept"] for side in ("source", "destination")]
        warned = [text for text in report["warnings"] if "did not keep the profile" in text]
        assert len(warned) == kept.count(False)
        broken += not all(kept)
    assert broken >= 1, "igb-4k has no room for 64 KiB of the device's own state"
    assert len(re.findall(r"^\+ '\[' 3 = 3 '\]'$", said, re.MULTILINE)) >= broken


@pytest.mark.parametrize("run", ["mlx5"], indirect=True)
def test_the_profiles_times_pass(run: Run) -> None:
    """At least them, once for each read of STOP_COPY and for each change of state that has one."""
    profile, counted = run.profile, run.report["qemu"]
    assert profile.stop_copy.bytes is not None
    each, reads = profile.reads.stop_copy.bytes, profile.reads.stop_copy.seconds
    assert each is not None
    assert reads is not None
    count = math.ceil(profile.stop_copy.bytes.value / each.value.mean)
    arcs = [*profile.source_arcs.values(), *profile.destination_arcs.values()]
    # The destination's write that loads, and its arc.
    assert [replay["calls"] for replay in run.replays] == [count + len(profile.source_arcs), 2]
    assert (
        counted["downtime_ms"] >= 1000 * (count * reads.value.mean + sum(arc.value.mean for arc in arcs)) - 1
    )
    # The guest ran for as long as the destination took in the initial data: QEMU waited for the ack.
    assert profile.loading.initial_seconds is not None
    assert counted["total_ms"] - counted["downtime_ms"] >= 1000 * profile.loading.initial_seconds.value


def test_the_page_names_all_shipped_profiles() -> None:
    rows = re.findall(r"^\| (`.*`) \|", PAGE.read_text().partition("## Shipped profiles")[2], re.MULTILINE)
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(rows))) == sorted(shipped())
