"""The command's promises: exit status, words, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from schemakit import conforms
from serverkit import PATIENCE_SECONDS, VFU_DEV, run_vfu_dev, runs


def descendants(pid: int) -> set[int]:
    """Return the process ids below `pid`."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found |= {int(entry.name)} | descendants(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("stub", "options", "says"),
    [
        (True, (), "has no vfio-pci"),
        (False, ("--front-end", "vfio-user-pci"), "does not migrate devices through vfio-user-pci"),
    ],
)
def test_a_qemu_that_does_not_migrate_the_device_is_refused_in_words(
    stub: bool, options: tuple[str, ...], says: str, unpatched: Path, library: Path, tmp_path: Path
) -> None:
    """Exit status 1 and a sentence that says what to do."""
    program = unpatched
    if stub:
        program = tmp_path / "qemu-stub"
        program.write_text("#!/bin/sh\necho 'QEMU emulator version 0.0.0'\n")
        program.chmod(0o755)
    argv = ["lab", "migrate", "--guest", "none", "--memory", "64K", "--out", tmp_path / "out", *options]
    done = run_vfu_dev(*argv, VFU_DEV_QEMU=str(program))
    assert done.returncode == 1
    assert says in done.stderr
    assert "vfu-dev build qemu" in done.stderr
    assert "Traceback" not in done.stderr


def test_odd_memory_is_refused(qemu: Path, library: Path, tmp_path: Path) -> None:
    """A size that is no whole number of pages is refused before anything starts."""
    done = run_vfu_dev("lab", "migrate", "--memory", "1000", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "multiple of 4096" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_pre_copy_it_completes(qemu: Path, library: Path, guest_image: Path, tmp_path: Path) -> None:
    """As the README has it, but with a bandwidth that is set: all of the device fits into the downtime limit.

    On a busy machine QEMU may measure one for which the device is too large.
    With a guest: without anything in RAM to send, QEMU 10.2 stops at once and asks nobody what is left.
    """
    argv = ["lab", "migrate", "--pre-copy", "off", "--avail-switchover-bandwidth", "100M"]
    done = run_vfu_dev(*argv, "--out", tmp_path / "out")
    # 3: the machine was too busy for the load, which says nothing of the migration.
    assert done.returncode in (0, 3), done.stderr
    assert "pre-copy 0 B" in done.stderr


def test_a_load_that_was_not_carried_is_status_3(qemu: Path, library: Path, tmp_path: Path) -> None:
    """The migration is as it should be; the answer has the unit that was asked for."""
    argv = ["lab", "migrate", "--guest", "none", "--load-place", "device", "--memory", "64K"]
    argv += ["--write-rate", "100T", "--write-size", "4K", "--out", str(tmp_path / "out")]
    argv += ["--downtime-limit", "299.5", "--max-bandwidth", "10Gbit"]
    done = run_vfu_dev(*argv)
    assert done.returncode == 3, done.stderr
    assert "QEMU takes whole milliseconds: --downtime-limit 299.5 is 300" in done.stderr
    assert "its own engine wrote " in done.stderr
    assert "102400 GiB/s were asked for" in done.stderr
    result = json.loads((tmp_path / "out" / "report.json").read_text())
    conforms("lab-migrate", result)
    assert result["status"] == "completed"
    assert result["qemu"]["parameters"] == {"downtime_limit": 300, "max_bandwidth": 1_250_000_000}


def test_killed_lab_leaves_no_process(qemu: Path, library: Path, tmp_path: Path) -> None:
    """Servers and QEMUs end with the lab, even when it is killed with -9."""
    argv = [*VFU_DEV, "lab", "migrate", "--guest", "none", "--memory", "2M", "--out", str(tmp_path / "out")]
    lab = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(children := descendants(lab.pid)) < 4:  # two servers, two QEMUs
        assert lab.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lab.send_signal(signal.SIGKILL)
    lab.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while alive := {pid for pid in children if runs(pid)}:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_lab_leaves_nothing(
    qemu: Path, library: Path, short_tmp: Path, number: signal.Signals
) -> None:
    """Ctrl-C, and what `timeout` and CI send: the signal's status, no process, no folder of sockets."""
    argv = [*VFU_DEV, "lab", "migrate", "--guest", "none", "--memory", "2M", "--out", str(short_tmp / "out")]
    temporary = short_tmp / "t"
    temporary.mkdir()
    env = dict(os.environ, TMPDIR=str(temporary))
    lab = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(children := descendants(lab.pid)) < 4:  # two servers, two QEMUs
        assert lab.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list(temporary.iterdir())
    lab.send_signal(number)
    _, said = lab.communicate(timeout=PATIENCE_SECONDS)
    assert lab.returncode == 128 + number
    assert "interrupted" in said
    assert "Traceback" not in said
    assert list(temporary.iterdir()) == []
    assert not any(runs(pid) for pid in children)
