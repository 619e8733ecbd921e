"""The cookbook's commands, run as they stand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from pagekit import run_script, shell_blocks
from serverkit import PATIENCE_SECONDS

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook.md"


def test_cookbook_word_for_word(qemu: Path, library: Path, guest_image: Path, tmp_path: Path) -> None:
    """All `sh` blocks, in order, in one shell, end without an error."""
    output = run_script("\n".join(shell_blocks(COOKBOOK)), tmp_path, tmp_path, 2 * PATIENCE_SECONDS)
    assert len(re.findall(r'^\{.*"verified":true', output, re.MULTILINE)) == 1
    # What the page says about dirty pages, which a guest that refuses its load would leave untested.
    assert '"ok":false' not in output, output[-3000:]
    replies = [json.loads(line) for line in re.findall(r'^\{"reply".*\}$', output, re.MULTILINE)]
    assert [reply["reply"] for reply in replies] == ["start", "stop", "verify", "status"]
    started, stopped = replies[:2]
    assert started["writes_per_second"] == 256
    assert stopped["writes"] > 0
    initial, dirty = (
        [int(size) for size in re.findall(rf"vfio_state_pending_\w+ .*precopy {kind} size (\d+)", output)]
        for kind in ("initial", "dirty")
    )
    assert max(initial) > 0
    assert max(dirty) > 0, "no page was dirtied again while the device was in PRE_COPY"
    for folder in re.findall(r"/tmp/tmp\.\w+", output)[:1]:
        shutil.rmtree(folder, ignore_errors=True)


def test_cookbook_has_both_halves() -> None:
    """The page has blocks to run: a guard against a change of its format that would test nothing."""
    text = "\n".join(shell_blocks(COOKBOOK))
    for needed in (
        "vfu-dev serve",
        "-incoming defer",
        "migrate uri=unix:",
        "migrate uri=file:",
        "migrate_cancel",
    ):
        assert needed in text
