"""`check-device` and `new-device`, as commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, run_vfu_dev

KVSTORE = f"{Path(__file__).parents[2] / 'docs' / 'examples' / 'kvstore.py'}:KeyValueStore"

BAD = """
from vfu_dev.device import Device, Field, Registers

class Forgetful(Device):
    registers = Registers(0, [Field("mode", 0x0, "<u4", "rw", "the guest's choice")])

class Impossible(Device):
    registers = Registers(0, [Field("mode", 0x0, ">u4", "rw", "big endian")])

class Unmade(Device):
    registers = Registers(0, [Field("mode", 0x0, "<u4", "rw", "the guest's choice", migrates=True)])

    def initialise(self):
        self.nowhere.fill(0)

class Sized(Unmade):
    def __init__(self, name=None, *, memory_bytes, **more):
        self.nowhere = bytearray(memory_bytes)
        super().__init__(name, **more)

    def initialise(self):
        assert len(self.nowhere) == 8192
"""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Return a file with classes that something is wrong with."""
    path = tmp_path / "bad.py"
    # The second class cannot even be declared.
    path.write_text(BAD.replace('">u4"', '"<u4"').replace("big endian", "fine"))
    return path


def test_check_device_says_what_each_check_is_about(tmp_path: Path) -> None:
    """A good device: ten lines, status 0, and the same as JSON."""
    done = run_vfu_dev("check-device", KVSTORE, "--json", str(tmp_path / "check.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok      round_trip: What a guest sees and what migrates is equal" in done.stdout
    assert "KeyValueStore: 10 of 10 checks passed" in done.stdout
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["ok"]
    assert len(found["checks"]) == 10
    assert all(check["ok"] and check["problem"] is None for check in found["checks"])


def test_check_device_says_what_is_broken(bad: Path) -> None:
    """Status 1, with the check and what it found; of a class that cannot be made nothing else is said."""
    done = run_vfu_dev("check-device", f"{bad}:Forgetful", "--quiet")
    assert done.returncode == 1
    assert "BROKEN  round_trip: in slices of 7 bytes, what a guest reads differs in: mode" in done.stdout
    assert "9 of 10" in done.stdout
    unmade = run_vfu_dev("check-device", f"{bad}:Unmade", "--json")
    assert unmade.returncode == 1
    first, *others = json.loads(unmade.stdout)["checks"]
    assert "bad.py:14: AttributeError" in first["problem"]
    assert {check["ok"] for check in others} == {None}
    assert run_vfu_dev("check-device", f"{bad}:Sized", "--memory", "8K").returncode == 0


def test_check_device_refuses_what_is_no_class(bad: Path) -> None:
    """A usage error, one line, with what there is."""
    for spec, said in {
        f"{bad}:Missing": "devices there: Forgetful, Impossible, Unmade, Sized",
        "nowhere.py:Device": "there is no file nowhere.py",
        "kvstore.py": "expected MODULE:CLASS or FILE.py:CLASS",
    }.items():
        done = run_vfu_dev("check-device", spec)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    bad.write_text(BAD)
    done = run_vfu_dev("check-device", f"{bad}:Forgetful")
    assert done.returncode == 2
    assert "big endian" in done.stderr or "'>u4'" in done.stderr


def test_a_new_device_is_a_good_one(tmp_path: Path) -> None:
    """It passes every check and its test runs; nothing is written over unasked."""
    done = run_vfu_dev("new-device", "devices/ring_nic", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written["device"] == "devices/ring_nic.py:RingNic"
    checked = run_vfu_dev("check-device", written["device"], cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    pytest_argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", written["test"]]
    tested = subprocess.run(
        pytest_argv, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, cwd=tmp_path
    )
    assert tested.returncode == 0, tested.stdout
    assert "3 passed" in tested.stdout
    for path in (tmp_path / "devices").glob("*.py"):
        assert "DEVICE" not in path.read_text()
        assert "MODULE" not in path.read_text()
        assert all(len(line) <= 110 for line in path.read_text().splitlines())

    (tmp_path / "devices" / "ring_nic.py").write_text("mine")
    again = run_vfu_dev("new-device", "devices/ring_nic.py", cwd=tmp_path)
    assert again.returncode == 2
    assert "there already; choose another name, or --force" in again.stderr
    assert (tmp_path / "devices" / "ring_nic.py").read_text() == "mine"
    assert run_vfu_dev("new-device", "devices/ring_nic.py", "--force", cwd=tmp_path).returncode == 0
    named = run_vfu_dev("new-device", "ring-nic.py", cwd=tmp_path)
    assert named.returncode == 2
    assert "expected the name of a Python module" in named.stderr
