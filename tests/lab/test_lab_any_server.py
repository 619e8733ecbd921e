"""`lab migrate --server`: any vfio-user server in place of ours, here the peer in C, through real QEMU."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, runs, wait_until

from vfu_dev.builds import artifact
from vfu_dev.client import VfioUserDevice
from vfu_dev.client.listening import remove_socket_folder, socket_folder
from vfu_dev.errors import ConfigError
from vfu_dev.uapi import VFIO_PCI_BAR2_REGION_INDEX
from vfu_dev.vm.any_server import WITHOUT_CONTROL, split_command

MIB = 1 << 20


def migrate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vfu_dev", "lab", "migrate", "--guest", "none", "--quiet"]
    command += ["--out", str(folder), "--keep", "--json", str(folder / "found.json"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def filled(seed: int, size_bytes: int) -> bytes:
    """Return what the peer fills its memory with (native/bench/peer.patch, main())."""
    words = []
    for _ in range(size_bytes // 8):
        seed = (seed * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        words.append(seed)
    return struct.pack(f"<{len(words)}Q", *words)


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
        wait_until(lambda number=number: not runs(int(number)), f"the child of {side}'s server is gone")
        assert (tmp_path / "logs" / f"server-{side}-vfu0.log").exists()


def test_the_destination_has_what_the_source_had(tmp_path: Path) -> None:
    """The source alone is filled. After the move a client reads each byte of BAR2 at the destination.

    The destination's server outlives the lab, in a session of its own; a hard link keeps its socket.
    """
    peer = artifact("bench-peer", build=True)
    folder = socket_folder("vfu-test-")  # beside the lab's: a hard link stays in its file system
    script = (
        f"test {{side}} = destination || exec {peer} {{socket}} 4 7; "
        f"setsid {peer} {{socket}} 4 & echo $! >{tmp_path}/pid; "
        f"until ln {{socket}} {folder}/kept; do sleep 0.01; done; wait"
    )
    try:
        done = migrate(tmp_path, "--server", f"sh -c '{script}'", "--downtime-limit", "10000")
        assert done.returncode == 0, done.stderr
        with VfioUserDevice.connect(folder / "kept", timeout_seconds=PATIENCE_SECONDS) as client:
            found = client.region_read(VFIO_PCI_BAR2_REGION_INDEX, 0, 4 * MIB)
        assert bytes(found) == filled(7, 4 * MIB)
    finally:
        if (pid := tmp_path / "pid").exists():
            with suppress(ProcessLookupError):  # it ended by itself, and the test has failed
                os.kill(int(pid.read_text()), signal.SIGKILL)
        remove_socket_folder(folder)


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
