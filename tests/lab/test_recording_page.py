"""docs/recording.md, run as it stands with each QEMU: what its traces and its record of calls say."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pagekit import made_folder, run_script, shell_blocks
from serverkit import PATIENCE_SECONDS, short_folder

from vfu_dev.builds.qemu_binary import QemuBinary, find_qemu
from vfu_dev.profile import Mark, Profile, read_profile
from vfu_dev.profile.compare import Tolerance, differences
from vfu_dev.profile.keys import entries
from vfu_dev.profile.model import MigrationSettings
from vfu_dev.profile.session import PHASES

PAGE = Path(__file__).parents[2] / "docs" / "recording.md"
BLOCKS = shell_blocks(PAGE)
# The traces of 10.2 are read in tests/unit too; its run of the page is left to the long run.
RELEASES = ("10.0", pytest.param("10.2", marks=pytest.mark.soak), "11.1")


@dataclass(frozen=True)
class Recorded:
    """What the page leaves behind."""

    release: str
    folder: Path
    said: str
    trace: Profile
    calls: Profile


@pytest.fixture(scope="module", params=RELEASES)
def recorded(
    request: pytest.FixtureRequest,
    stock_qemu: Callable[[str], QemuBinary],
    unpatched: Path,
    library: Path,
    preload: Path,
) -> Iterator[Recorded]:
    """One run of the page with a QEMU of that release."""
    suites = {"10.0": "bookworm-backports", "11.1": "trixie-backports"}
    binary = stock_qemu(suites[request.param]) if request.param in suites else find_qemu(str(unpatched))
    command = " ".join([str(binary.path), *(f"-L {folder}" for folder in binary.firmware)])
    with short_folder() as folder:
        said = run_script("\n".join(BLOCKS), folder, folder, 2 * PATIENCE_SECONDS, QEMU=command)
        run = made_folder(said)
        try:
            trace, calls = (read_profile(run / f"{name}.toml") for name in ("device", "calls"))
            yield Recorded(request.param, run, said, trace, calls)
        finally:
            shutil.rmtree(run, ignore_errors=True)


def test_the_page_has_commands() -> None:
    """A guard against a change of its format that would run nothing."""
    text = "\n".join(BLOCKS)
    for needed in ("profile record", "profile import", "profile show", "profile diff", "-msg timestamp=on"):
        assert needed in text


def test_the_move_is_in_the_profile(recorded: Recorded) -> None:
    """Both sides, whole, with sizes of an 8 MiB device that became dirty meanwhile."""
    profile = recorded.trace
    assert profile.migration == MigrationSettings(
        max_bandwidth=32 << 20, downtime_limit_ms=500.0, switchover_ack=False, guest="idle"
    )
    found = profile.recorded
    assert (found.source, found.destination, found.timestamps, found.cut_off) == (True, True, True, False)
    assert (found.migrations, found.completed) == (1, 1)
    assert profile.initial.bytes is not None
    assert 8 << 20 < profile.initial.bytes.value < 9 << 20
    assert profile.dirty.curve is not None
    assert profile.dirty.curve.value[-1][1] > 0
    # Which kind it is depends on how much became dirty between two questions, and so on the machine.
    assert profile.stop_copy.kind is not None
    assert profile.stop_copy.kind == recorded.calls.stop_copy.kind
    assert found.precopy_bytes is not None
    assert found.precopy_bytes >= 8 << 20
    for feature in ("pre_copy", "p2p", "data_size"):
        value = getattr(profile.features, feature)
        assert (value.value, value.mark) == (True, Mark.MEASURED), feature
    assert set(profile.source_arcs) == {
        "RUNNING->PRE_COPY",
        "PRE_COPY->PRE_COPY_P2P",
        "PRE_COPY_P2P->STOP_COPY",
        "STOP_COPY->STOP",
    }
    assert set(profile.destination_arcs) == {
        "RUNNING->RESUMING",
        "RESUMING->RUNNING_P2P",
        "RUNNING_P2P->RUNNING",
    }


def test_calls_and_trace_measured_the_same(recorded: Recorded) -> None:
    """Two witnesses of one move: sizes are equal, and the bytes of all reads."""
    sizes = Tolerance(size_part=0.0, time_part=1.0, time_least=10.0)  # how fast the machine was is no matter
    assert differences(recorded.trace, recorded.calls, sizes, measured=True) == []
    both = {entry.key for entry in entries(recorded.trace)} & {entry.key for entry in entries(recorded.calls)}
    assert {"initial.bytes", "dirty.curve", "reads.initial.bytes", "stop_copy.kind"} <= both
    for profile in (recorded.trace, recorded.calls):
        total = sum(
            getattr(profile.reads, phase).bytes.value.total
            for phase in PHASES
            if getattr(profile.reads, phase).bytes is not None
        )
        assert total == (profile.recorded.precopy_bytes or 0) + (profile.recorded.stop_copy_bytes or 0)
    written = [
        sum(
            getattr(profile.writes, phase).bytes.value.total
            for phase in PHASES
            if getattr(profile.writes, phase).bytes is not None
        )
        for profile in (recorded.trace, recorded.calls)
    ]
    assert written[0] == written[1] > 8 << 20


def test_what_a_trace_bounds_holds_the_measured_value(recorded: Recorded) -> None:
    """A read takes no longer than the gap that contains it, neither each nor all of them."""
    compared = 0
    for phase in PHASES:
        bound, measured = (getattr(one.reads, phase) for one in (recorded.trace, recorded.calls))
        for name in ("seconds", "first_seconds"):
            most, exact = getattr(bound, name), getattr(measured, name)
            if most is None or exact is None:
                continue
            assert (most.mark, exact.mark) == (Mark.BOUNDED, Mark.MEASURED)
            if name == "seconds" and most.value.count == exact.value.count:
                assert exact.value.total <= most.value.total + 1e-6 * most.value.count
                compared += 1
            elif name == "first_seconds":
                assert exact.value <= most.value + 1e-6
                compared += 1
    assert compared >= 2


def test_only_the_record_of_calls_has_the_times_of_the_dma_log(recorded: Recorded) -> None:
    assert recorded.trace.dma_logging.report_seconds is None
    assert recorded.calls.dma_logging.report_seconds is not None
    assert recorded.calls.dma_logging.report_seconds.value.count >= 1
    for profile in (recorded.trace, recorded.calls):
        ranges = profile.dma_logging.max_ranges
        assert ranges is not None
        assert (ranges.mark, ranges.highest) == (Mark.BOUNDED, None)


def test_no_name_gets_into_a_profile(recorded: Recorded) -> None:
    """Devices, hosts, folders and users are in the trace, and not in what is made of it."""
    trace = (recorded.folder / "a.log").read_text(errors="replace")
    assert "a.sock.vfio" in trace
    for name in ("device", "calls"):
        text = (recorded.folder / f"{name}.toml").read_text()
        for word in ("a.sock", "b.sock", "/tmp", recorded.folder.name, os.uname().nodename, "root"):
            assert word not in text, word
    lines = (recorded.folder / "a.calls").read_text().splitlines()
    assert lines[0] == "vfu-dev calls 1"
    assert len(lines) > 20
    assert not [
        line for line in lines[1:] if not re.fullmatch(r"[\d ]+ [a-z0-9-]+[\d ]* = -?\d+[\d ]*", line)
    ]


def test_the_page_shows_it(recorded: Recorded) -> None:
    assert re.search(r"^device: 8 MiB of initial data; .* became dirty in ", recorded.said, re.MULTILINE)
    assert "the same, within what is allowed" in recorded.said
