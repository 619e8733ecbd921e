"""VFU_DEV_PRELOAD_CALLS: calls on descriptors of the kernel's are recorded, and nothing of them is changed.

A descriptor on /dev/null stands for a device: the kernel itself answers, with ENOTTY. What is recorded of a
device that answers is in tests/lab/test_recording_page.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from preloadkit import run_preloaded

from vfu_dev.profile.from_calls import Call, read_calls

SCRIPT = """
import errno, fcntl, os, struct
FEATURE, RESET = 15221, 15215       # VFIO_DEVICE_FEATURE, VFIO_DEVICE_RESET
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
fd, other = os.open("/dev/null", os.O_RDWR), os.open("/dev/null", os.O_RDWR)
def feature(descriptor, flags, data):
    buffer = bytearray(struct.pack("<II", 8 + len(data), flags) + data)
    try:
        fcntl.ioctl(descriptor, FEATURE, buffer)
    except OSError as error:
        assert error.errno == errno.ENOTTY, error
    else:
        raise AssertionError("the kernel has no such call on /dev/null")
    assert bytes(buffer[8:]) == data
feature(fd, SET | 2, struct.pack("<Ii", 6, -1))           # PRE_COPY
feature(other, GET | 9, bytes(8))
feature(fd, PROBE | SET | 6, bytes(24))
feature(fd, SET | 6, struct.pack("<QIIQ", 4096, 3, 0, 0))
feature(fd, GET | 5, bytes(16))                            # not about migration
try:
    fcntl.ioctl(fd, RESET)
except OSError as error:
    assert error.errno == errno.ENOTTY
assert os.read(fd, 10) == b"" and os.write(fd, b"abc") == 3
print("done")
"""


def recorded(folder: Path, **environment: str) -> list[Call]:
    path = folder / "calls"
    argv = [sys.executable, "-S", "-c", SCRIPT]
    done = run_preloaded(argv, [], {"VFU_DEV_PRELOAD_CALLS": str(path), **environment})
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    if not path.exists():
        assert "no calls are recorded" in done.stderr
        return []
    with path.open("rb") as file:
        found = list(read_calls(file, "calls"))
    assert all(isinstance(call, Call) for call in found), found
    return [call for call in found if isinstance(call, Call)]


def test_calls_that_the_kernel_answers_are_recorded(tmp_path: Path) -> None:
    """Without any socket; devices by number, PROBE and other features left out, no data of anybody's."""
    found = recorded(tmp_path)
    assert [(call.device, call.name, call.asked, call.result) for call in found] == [
        (0, "set-state", [6], -25),
        (1, "data-size", [], -25),
        (0, "log-start", [3], -25),
        (0, "reset", [], -25),
    ]
    times = [time for call in found for time in (call.begin, call.end)]
    assert times == sorted(times)


def test_a_file_that_cannot_be_opened_is_said_and_costs_nothing(tmp_path: Path) -> None:
    assert recorded(tmp_path, VFU_DEV_PRELOAD_CALLS="/proc/nowhere/calls") == []


def test_two_programs_append_to_one_file(tmp_path: Path) -> None:
    assert len(recorded(tmp_path)) == 4
    assert len(recorded(tmp_path)) == 8
