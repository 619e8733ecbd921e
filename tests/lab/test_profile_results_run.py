"""The tables of docs/profile-results.md can be made anew: one scenario, one move each, one QEMU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pagekit import ROOT

from vfu_dev.series.summary import read_summary

sys.path.insert(0, str(ROOT / "docs" / "profile-results"))

import collect


def test_the_results_go_on_where_a_device_does_not_keep_to_its_profile(
    qemu: Path, library: Path, preload: Path, guest_image: Path, tmp_path: Path
) -> None:
    """Two of these profiles have no room for the device's own state, on the fastest machine."""
    collect.run(tmp_path, ["small"], ["patched"], ["--set", "run.moves=1"])
    (column,) = collect.collect(tmp_path, ["small"], ["patched"])["columns"]
    assert [(one["variant"], one["statuses"]) for one in column["points"]] == [
        (name, {"completed": 1}) for name in ("igb", "hisi-acc", "qat")
    ]
    points = read_summary(tmp_path / "patched" / "small")["points"]
    for point in points[:2]:
        (lapse,) = point["not_kept"]
        (more,) = re.findall(r"the device's own state needed (\d+) bytes more", lapse["text"])
        assert f"STOP_COPY is {more}\n" in collect.PAGE.read_text()
