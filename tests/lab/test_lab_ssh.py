"""`lab migrate --destination ssh://HOST`: a real sshd in another network namespace, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from labkit import small
from serverkit import PATIENCE_SECONDS, wait_until
from sshkit import FarMachine, far_machine

from vfu_dev.errors import ConfigError
from vfu_dev.lab.far import settings_of
from vfu_dev.lab.remote import Destination

SMALL = ["--guest", "none", "--memory", "1M", "--dirty-rate", "64p", "--max-bandwidth", "16M"]
# 128 KiB: less than the device, so that something goes in PRE_COPY however slow the machine is.
FITS_NOT = ["--avail-switchover-bandwidth", "1280K", "--downtime-limit", "100"]


@pytest.fixture(scope="module")
def machine() -> Iterator[FarMachine]:
    with far_machine() as found:
        yield found


def left_behind(machine: FarMachine) -> list[str]:
    """Return what still runs there that a move started."""
    return [line for line in machine.far.run("ps", "axwwo", "args").splitlines() if "vfud-far" in line]


def test_a_move_to_another_machine(qemu: Path, library: Path, machine: FarMachine, tmp_path: Path) -> None:
    """Servers and QEMU run there, the report is made here, and nothing is left there."""
    words = [*SMALL, *FITS_NOT]
    command = ["--destination", machine.url, "--quiet", "--out", str(tmp_path), "--json", "-"]
    done = machine.run("lab", "migrate", *words, *command)
    assert done.returncode in (0, 3), done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    (device,) = report["devices"]
    assert device["digest_match"]
    assert device["precopy_bytes"] > 0
    assert device["transitions_destination"]
    assert report["guest"]["verified"]
    assert report["qemu"]["destination"]["version"] == report["qemu"]["source"]["version"]
    assert "/vfud-far-" in " ".join(report["qemu"]["command_line_destination"])
    assert "/vfud-far-" not in " ".join(report["qemu"]["command_line_source"])
    assert "RESUMING" in report["qemu"]["states_destination"]  # its trace was fetched
    assert abs(report["clocks"]["ahead_seconds"]) <= report["clocks"]["error_seconds"]
    assert "clocks may be the same" in done.stderr
    assert left_behind(machine) == []


def test_a_linux_guest_goes_on_there(
    qemu: Path, library: Path, guest_image: Path, machine: FarMachine, tmp_path: Path
) -> None:
    """It writes across the move, and reads all back over the far side's serial line."""
    words = ["--memory", "2M", "--dirty-rate", "64p", *FITS_NOT, "--destination", machine.url]
    done = machine.run("lab", "migrate", *words, "--quiet", "--out", str(tmp_path), "--json", "-")
    assert done.returncode in (0, 3), done.stderr
    report = json.loads(done.stdout)
    assert report["guest"]["verified"]
    assert report["guest"]["writes"] > 0
    assert report["guest"]["compared_bytes"] == 2 << 20
    assert left_behind(machine) == []


def test_a_connection_that_breaks_leaves_nothing_there(
    qemu: Path, library: Path, machine: FarMachine, tmp_path: Path
) -> None:
    """Killed outright in the middle of a migration, the lab is gone, and so is what ran there."""
    slow = ["--max-bandwidth", "1M", "--downtime-limit", "1", "--avail-switchover-bandwidth", "1K"]
    command = ["lab", "migrate", *SMALL, *slow, "--destination", machine.url, "--out", str(tmp_path)]
    with machine.start(*command) as lab:
        assert lab.stderr is not None
        assert any("migrating" in line for line in lab.stderr)
        assert left_behind(machine)
        lab.kill()
    wait_until(lambda: not left_behind(machine), "the far side has ended")


def test_a_far_side_that_hears_nothing_ends(qemu: Path, library: Path, short_tmp: Path) -> None:
    """A cut network ends neither ssh's session nor the input: the far side counts the time without a line."""
    settings = settings_of(small(qemu, library), "q35")
    command = [sys.executable, "-m", "vfu_dev", "lab", "host"]
    environment = os.environ | {"TMPDIR": str(short_tmp)}  # UNIX sockets have short names
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as host:
        assert host.stdin is not None
        assert host.stdout is not None

        def ask(request: dict[str, object]) -> dict[str, Any]:
            print(json.dumps(request), end="\n\n", file=host.stdin, flush=True)  # and a sign of life
            found: dict[str, Any] = json.loads(host.stdout.readline())  # type: ignore[union-attr]
            return found

        ask({"qemu": None, "front_end": None, "iommu": None})
        found = ask(settings | {"silence_seconds": 1.0})
        # It has talked to QEMU's monitor there, so the folder was there. By now it may be over.
        assert Path(found["qmp"]).parent.parent == short_tmp
        assert host.wait(PATIENCE_SECONDS) == 0, "its input is still open"
        assert list(short_tmp.iterdir()) == []


def test_what_is_wrong_there_is_said(qemu: Path, library: Path, machine: FarMachine, tmp_path: Path) -> None:
    """No host, no vfu-dev, a QEMU that is not there, things that are not built: status 1, in words."""
    empty = machine.folder / "empty"
    empty.write_text(f'#!/bin/sh\nVFU_DEV_CACHE={tmp_path} exec {machine.program} "$@"\n')
    empty.chmod(0o755)
    cases = [
        (["--destination", "ssh://nowhere.invalid"], "ssh nowhere.invalid: "),
        (["--destination", "ssh://far/no/vfu-dev"], "far: no vfu-dev answers there"),
        (["--destination", f"ssh://far{empty}"], "far has not libvfio-user and not a QEMU"),
        (["--destination", machine.url, "--qemu-destination", "/no/qemu"], "/no/qemu: no such QEMU"),
    ]
    for words, said in cases:
        done = machine.run("lab", "migrate", *SMALL, "--out", str(tmp_path / "out"), "--quiet", *words)
        assert done.returncode == 1, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert left_behind(machine) == []


def test_what_a_destination_is() -> None:
    found = Destination.parse("ssh://me@b.example:2222/opt/bin/vfu-dev")
    assert (found.host, found.port, found.program) == ("me@b.example", 2222, "/opt/bin/vfu-dev")
    assert Destination.parse("ssh://b") == Destination("b")
    assert found.ssh()[-4:] == ["-p", "2222", "--", "me@b.example"]
    for text in ("b", "http://b", "ssh://", "ssh://b:port", "ssh://-oProxyCommand=x", "ssh://b?x"):
        with pytest.raises(ConfigError):
            Destination.parse(text)
