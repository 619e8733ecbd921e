"""Running what a page shows as a shell script."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def shell_blocks(page: Path) -> list[str]:
    """Return the `sh` blocks of a page in order."""
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def made_folder(said: str) -> Path:
    """Return the one folder that a page's commands made with `mktemp -d`, from what `run_script` returned."""
    (made,) = set(re.findall(r"/tmp/tmp\.\w+", said))
    return Path(made)


def run_script(text: str, folder: Path, cwd: Path, seconds: float, **environment: str) -> str:
    """Run commands in bash, traced, up to the first that fails; return what they and their servers said.

    `vfu-dev` is this checkout's; script and output are in `folder`. It has to end, with status 0.
    """
    script, log = folder / "page.sh", folder / "output"
    script.write_text(f"set -e\n{text}\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "TMPDIR": "/tmp"} | environment
    # Its own session, so that whatever a failing script leaves behind ends with it; a file, because a pipe
    # would stay open for as long as a server that it left.
    with log.open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-x", str(script)],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        shell.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the page's commands hang:\n{log.read_text()[-3000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    said = log.read_text()
    assert shell.returncode == 0, said[-3000:]
    return said
