"""`lab migrate --server`: any vfio-user server in place of ours, here the peer in C, through real QEMU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serverkit import wait_until

from vfu_dev.builds import artifact
from vfu_dev.errors import ConfigError
from vfu_dev.vm.any_server import WITHOUT_CONTROL, split_command

MIB = 1 << 20


def migrate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vfu_dev", "lab", "migrate", "--guest", "none", "--quiet"]
    command += ["--out", str(folder), "--keep", "--json", str(folder / "found.json"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def ended(number: str) -> bool:
    """Return whether a process has ended; its parent may not have asked for its status yet."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_server_in_c_moves_its_state_through_qemu(tmp_path: Path) -> None:
    """4 MiB, filled at the source alone; all that the servers started is ended, and their logs are kept."""
    peer = artifact("bench-peer", build=True)
    # A shell that stays, and a child of its own: both have to go.
    fill = "$(test {side} = source && echo 7)"
    script = f"sleep 1000 & echo $! >>{tmp_path}/{{side}}.pids; {peer} {{socket}} 4 {fill}"
    done = migrate(tmp_path, "--server", f'sh -c "{script}"', "--downtime-limit", "10000")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["status"] == "completed"
    assert found["qemu"]["vfio_bytes"] > 4 * MIB
    assert found["devices"] == []
    assert WITHOUT_CONTROL in found["warnings"]
    for side in ("source", "destination"):
        (number,) = (tmp_path / f"{side}.pids").read_text().split()
        wait_until(lambda number=number: ended(number), f"the child of {side}'s server is gone")
        assert (tmp_path / "logs" / f"server-{side}-vfu0.log").exists()


def test_a_server_that_does_not_come_up_is_named(tmp_path: Path) -> None:
    done = migrate(tmp_path, "--server", "sh -c 'echo no device here >&2; exit 7' {socket}")
    assert done.returncode == 1
    assert "no device here" in done.stderr
    assert "exit status 7" in done.stderr


def test_what_only_our_server_has_is_refused(tmp_path: Path) -> None:
    done = migrate(tmp_path, "--server", "true {socket}", "--memory", "4M")
    assert done.returncode == 2
    assert "--memory: is for our own server" in done.stderr
    for command in ("true", "'", ""):
        with pytest.raises(ConfigError, match="--server"):
            split_command(command)
