"""`vfu-dev doctor` and `vfu-dev build`: what they say about a machine where nothing is built."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vfu_dev.builds import packages
from vfu_dev.builds.packages import MissingPackagesError, Need


def vfu_dev(cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from vfu_dev.cli import main; sys.exit(main(sys.argv[1:]))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VFU_DEV_")}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=clean | {"VFU_DEV_CACHE": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_with_nothing_built_every_problem_says_what_to_do(tmp_path: Path) -> None:
    done = vfu_dev(tmp_path / "cache", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    fixes = {problem["fix"] for problem in report["problems"]}
    assert {f"vfu-dev build {name}" for name in ("libvfio-user", "vfu-kernels", "qemu", "guest")} <= fixes
    assert report["python"]["packages"]["numpy"]
    assert report["cache"] == {"path": str(tmp_path / "cache"), "bytes": {}}
    assert not (tmp_path / "cache").exists(), "doctor wrote to the cache"

    text = vfu_dev(tmp_path / "cache", "doctor")
    assert text.returncode == 1
    assert "to do: vfu-dev build qemu" in text.stdout


@pytest.mark.parametrize(
    ("properties", "can"),
    [
        ("vfio-user-pci options:\n  enable-migration=<OnOffAuto>\n  socket=<SocketAddress>", "migrate"),
        ("vfio-user-pci options:\n  socket=<SocketAddress>", "attach"),
        ("Device 'vfio-user-pci' not found", "nothing"),
    ],
)
def test_a_qemu_is_judged_by_the_properties_of_its_device(tmp_path: Path, properties: str, can: str) -> None:
    """The program stands in for QEMUs that need not exist here; its answers are those of real ones."""
    qemu = program(
        tmp_path / "qemu",
        f'case "$1" in --version) echo "QEMU emulator version 10.2.2";; *) echo "{properties}";; esac',
    )
    done = vfu_dev(tmp_path / "cache", "doctor", "--json", VFU_DEV_QEMU=str(qemu))
    report = json.loads(done.stdout)
    found = report["qemu"][0]
    assert (found["path"], found["from"], found["version"]) == (str(qemu), "VFU_DEV_QEMU", "10.2.2")
    assert found["can"] == can
    migrates = {name: one["migrates"] for name, one in found["front_ends"].items()}
    assert migrates == ({} if can == "nothing" else {"vfio-user-pci": can == "migrate"})
    assert set(report["qemu_absent"]) == {"unpatched", "bookworm-backports", "trixie-backports"}
    complaints = [problem for problem in report["problems"] if str(qemu) in problem["what"]]
    assert bool(complaints) == (can != "migrate")


def test_a_variable_that_names_nothing_is_the_problem_and_building_is_not_the_advice(tmp_path: Path) -> None:
    """While it is set, what is built is not looked at."""
    folder = tmp_path / "empty"
    folder.mkdir()
    for value, why in ((tmp_path / "absent", "no such file"), (folder, "no qemu-system-x86_64 in it")):
        done = vfu_dev(tmp_path / "cache", "doctor", "--json", VFU_DEV_QEMU=str(value))
        assert done.returncode == 1, done.stderr
        about = [one for one in json.loads(done.stdout)["problems"] if "VFU_DEV_QEMU" in one["what"]]
        assert len(about) == 1
        assert why in about[0]["what"]
        assert about[0]["fix"] == "unset VFU_DEV_QEMU, or set it to one that exists"
    broken = program(tmp_path / "broken", "echo libaio.so.1: not found >&2; exit 127")
    report = json.loads(vfu_dev(tmp_path / "cache", "doctor", "--json", VFU_DEV_QEMU=str(broken)).stdout)
    assert any("does not run: libaio.so.1" in one["what"] for one in report["problems"])


def test_verify_reads_what_is_there(tmp_path: Path) -> None:
    done = vfu_dev(tmp_path / "cache", "doctor", "--verify", "--json")
    assert json.loads(done.stdout)["verified"] == []


def test_an_unknown_artifact_is_a_usage_error_that_lists_them(tmp_path: Path) -> None:
    done = vfu_dev(tmp_path / "cache", "build", "qmeu")
    assert done.returncode == 2
    assert "'qmeu' is not one of 'libvfio-user'" in done.stderr


def test_a_need_is_there_when_all_its_probes_find_it(tmp_path: Path) -> None:
    (tmp_path / "there.h").touch()
    assert Need("p", files=(f"{tmp_path}/absent", f"{tmp_path}/*.h")).present()
    assert not Need("p", files=(f"{tmp_path}/absent",)).present()
    assert Need("p", program="sh").present()
    assert not Need("p", program="sh", files=(f"{tmp_path}/absent",)).present()
    assert not Need("p", module="no-such-module").present()


def test_missing_packages_are_named_once_with_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Need("libabsent-dev", files=("/nowhere/absent.h",))
    monkeypatch.setitem(packages.GROUPS, "one", (absent, Need("sh", program="sh")))
    monkeypatch.setitem(packages.GROUPS, "two", (absent,))
    assert packages.missing(["one", "two"]) == ["libabsent-dev"]
    error = MissingPackagesError(["libabsent-dev"], "building x")
    assert str(error).splitlines()[1].endswith("apt-get install -y --no-install-recommends libabsent-dev")
