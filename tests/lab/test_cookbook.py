"""The cookbook's commands, run as they stand."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook.md"


def blocks() -> list[str]:
    """Return the `sh` blocks of the page in order."""
    return re.findall(r"^```sh\n(.*?)^```$", COOKBOOK.read_text(), re.MULTILINE | re.DOTALL)


def test_cookbook_word_for_word(qemu: Path, library: Path, guest_image: Path, tmp_path: Path) -> None:
    """All `sh` blocks, in order, in one shell, end without an error."""
    script = tmp_path / "cookbook.sh"
    script.write_text("set -e\n" + "\n".join(blocks()))
    tools = Path(sys.executable).parent
    env = dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", TMPDIR="/tmp")
    log = tmp_path / "output"
    # Its own session, so that whatever a failing script leaves behind ends with it; a file, because a pipe
    # would stay open for as long as a server that it left.
    with log.open("w") as out:
        shell = subprocess.Popen(
            ["bash", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        shell.wait(timeout=2 * PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the cookbook hangs:\n{log.read_text()[-3000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    output = log.read_text()
    assert shell.returncode == 0, output[-3000:]
    assert output.count('"verified":true') == 1
    # What the page says about dirty pages, which a guest that refuses its load would leave untested.
    assert '"ok":false' not in output, output[-3000:]
    replies = [json.loads(line) for line in re.findall(r'^\{"reply".*\}$', output, re.MULTILINE)]
    assert [reply["reply"] for reply in replies] == ["start", "stop", "verify", "status"]
    started, stopped = replies[:2]
    assert started["writes_per_second"] == 256
    assert stopped["writes"] > 0
    initial, dirty = (
        [
            int(size)
            for size in re.findall(rf"vfio_state_pending_estimate .*precopy {kind} size (\d+)", output)
        ]
        for kind in ("initial", "dirty")
    )
    assert max(initial) > 0
    assert max(dirty) > 0, "no page was dirtied again while the device was in PRE_COPY"
    for folder in re.findall(r"/tmp/tmp\.\w+", output)[:1]:
        shutil.rmtree(folder, ignore_errors=True)


def test_cookbook_has_both_halves() -> None:
    """The page has blocks to run: a guard against a change of its format that would test nothing."""
    text = "\n".join(blocks())
    for needed in (
        "vfu-dev serve",
        "-incoming defer",
        "migrate uri=unix:",
        "migrate uri=file:",
        "migrate_cancel",
    ):
        assert needed in text
