"""docs/bug-report.md, run as it stands: a stranger's trace, a profile, two QEMUs, and their comparison."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pagekit import ROOT, made_folder, run_script, shell_blocks
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.profile import Mark, Profile, read_profile
from vfu_dev.series.rows import Row, read_rows

BLOCKS = shell_blocks(ROOT / "docs" / "bug-report.md")
TRACES = ROOT / "docs" / "examples" / "bug-report"
# The page's names of the QEMUs, and what each says of itself.
QEMUS = {"patched": "10.2", "trixie-backports": "11.1"}
ARC = "RESUMING->RUNNING_P2P"


@dataclass(frozen=True)
class Walked:
    """What the page's commands said and left."""

    said: str
    folder: Path

    @property
    def profile(self) -> Profile:
        """What was made of the traces."""
        return read_profile(self.folder / "reported.toml")

    @property
    def arc_ms(self) -> float:
        """The reported arc."""
        return 1000 * self.profile.destination_arcs[ARC].value.mean

    def report(self, qemu: str) -> dict[str, Any]:
        """Return the report of the single move."""
        return dict(json.loads((self.folder / f"one-{qemu}" / "report.json").read_text()))

    def rows(self, qemu: str) -> list[Row]:
        """Return the moves of the series."""
        return read_rows(self.folder / qemu / "reported-nic" / "moves.csv")


@pytest.fixture(scope="module")
def walked(
    qemu: Path,
    stock_qemu: Callable[[str], QemuBinary],
    library: Path,
    preload: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Walked]:
    """One run of the page."""
    stock_qemu("trixie-backports")
    folder = tmp_path_factory.mktemp("page")
    said = run_script("\n".join(BLOCKS), folder, folder, 4 * PATIENCE_SECONDS, TRACES=str(TRACES))
    made = made_folder(said)
    yield Walked(said, made)
    shutil.rmtree(made, ignore_errors=True)


def test_the_page_has_these_steps() -> None:
    """A guard against a change of the page that would test nothing."""
    text = "\n".join(BLOCKS)
    steps = ("profile import", "profile show", "lab migrate --profile", "lab run", "lab compare")
    assert [text.count(f"vfu-dev {step}") for step in steps] == [1] * len(steps)
    assert text.count(f"for QEMU in {' '.join(QEMUS)}; do") == 2


def test_the_trace_measured_the_slow_arc_and_names_nobody(walked: Walked) -> None:
    slow = walked.profile.destination_arcs[ARC]
    assert slow.mark is Mark.MEASURED
    assert 0.9 <= slow.value.mean < 0.95
    said = r"its slowest change of state is RESUMING to RUNNING_P2P at the destination: 90\d ms"
    assert re.search(said, walked.said)
    names = (walked.folder / "names").read_text()
    for name in ("rack7-a.corp", "rack7-b.corp", "3b:00.2", "5e:01.4", "alice"):
        assert name in names
    assert not re.search(r"corp|rack7|3b:00|5e:01|alice", (walked.folder / "reported.toml").read_text())


@pytest.mark.parametrize("qemu_name", QEMUS)
def test_the_reported_downtime_is_reproduced(walked: Walked, qemu_name: str) -> None:
    """To the byte, and over the limit, because of the destination's arc; by QEMU's own vfio-pci."""
    report, profile = walked.report(qemu_name), walked.profile
    assert report["versions"]["qemu"].startswith(QEMUS[qemu_name])
    assert report["qemu"]["source"]["front_end"] == "vfio-pci"
    assert (report["status"], report["moved"], report["problems"]) == ("completed", True, [])
    assert profile.stop_copy.bytes is not None
    (device,) = report["devices"]
    assert device["stop_copy_bytes"] == profile.stop_copy.bytes.value
    assert device["digest_match"] is True
    assert report["qemu"]["downtime_ms"] >= walked.arc_ms - 1 > report["qemu"]["downtime_limit_ms"]
    assert any(f"limit {report['qemu']['downtime_limit_ms']} ms" in text for text in report["warnings"])


def test_both_series_show_it_and_are_compared(walked: Walked) -> None:
    for name in QEMUS:
        rows = walked.rows(name)
        assert [row.status for row in rows] == ["completed"] * 4
        assert all(row.metrics["downtime_ms"] >= walked.arc_ms - 1 for row in rows)
    compared = json.loads((walked.folder / "compared.json").read_text())
    medians = {name: sorted(row.metrics["downtime_ms"] for row in walked.rows(name)) for name in QEMUS}
    first, second = ((values[1] + values[2]) / 2 for values in medians.values())
    (found,) = compared["entries"]
    assert (found["point"], found["metric"]) == ("all", "downtime_ms")
    assert (found["first"]["n"], found["second"]["n"]) == (4, 4)
    assert (found["first"]["p50"], found["second"]["p50"]) == (pytest.approx(first), pytest.approx(second))
    assert [compared[side]["versions"]["qemu"][:4] for side in ("first", "second")] == [*QEMUS.values()]
