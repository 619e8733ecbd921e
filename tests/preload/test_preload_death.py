"""A server that goes away or falls silent: the device is as if unplugged, and the program lives on."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable

import pytest
from inside import Served, inside
from vfio import (
    CONFIG,
    DATA_EVENTFD,
    DATA_NONE,
    DEVICE_RESET,
    MSIX,
    PAGE,
    PATHS,
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    TRIGGER,
    Attached,
    Device,
    Iommufd,
    Memory,
    Path,
    precopy_info,
    refused,
)

MEMORY_BAR = 2
# Of the servers that fall silent. It is also the limit for what they still answer, on a busy machine too.
SILENCE_MS = "10000"


def is_dead(way: Attached) -> None:
    """All that QEMU does to a device, of one whose server is gone: what must work works, the rest says so."""
    device = way.device
    assert device.read(CONFIG, 0, 4) == b"\xff" * 4
    assert device.read(MEMORY_BAR, 8, 100) == b"\xff" * 100
    assert device.write(MEMORY_BAR, 0, b"12345678") == 8
    assert device.write(CONFIG, 4, b"\6\0") == 2
    assert device.info()[1] == 9
    assert device.region(MEMORY_BAR)[1] > 0
    device.reset()  # QEMU's answer to a failure is hw_error()
    fcntl.ioctl(device.fd, DEVICE_RESET)
    # Interrupts are set up and taken down by a VM that runs on.
    device.set_irqs(DATA_EVENTFD | TRIGGER, MSIX, 0, 1, struct.pack("<i", os.eventfd(0)))
    device.set_irqs(DATA_NONE | TRIGGER, MSIX, 0, 0)
    for state in (RUNNING, STOP, PRE_COPY, RESUMING):
        assert refused(device.set_state, state) == "ENOTCONN"
    assert refused(device.data_size) == "ENOTCONN"
    assert refused(device.log_start, (0, PAGE)) == "ENOTCONN"
    # A change of the memory map must not fail: QEMU gives up the VM over it.
    memory = Memory(PAGE)
    way.map(1 << 40, memory)
    assert way.unmap(1 << 40, PAGE) == PAGE
    way.close()


@pytest.mark.parametrize("path", PATHS)
@inside()
def test_killed_at_rest(path: Path, mortal: Served) -> None:
    way = Attached(path)
    way.map(0, Memory(PAGE))
    mortal.kill()
    is_dead(way)


@inside()
def test_killed_before_it_is_bound(mortal: Served) -> None:
    """Nobody answers: the bind says so, and a later one may succeed."""
    mortal.kill()
    device = Device(os.open("/dev/vfio/devices/vfio-user0", os.O_RDWR))
    iommufd = Iommufd()
    for _ in range(2):
        assert refused(device.bind, iommufd.fd) == "ECONNREFUSED"
    os.unlink(mortal.sockets[0])
    assert refused(device.bind, iommufd.fd) == "ENOENT"


@pytest.mark.parametrize("state", [PRE_COPY, STOP_COPY])
@inside()
def test_killed_while_it_is_saved(state: int, mortal: Served) -> None:
    way = Attached("iommufd-cdev")
    fd = way.device.set_state(state)
    assert os.read(fd, 100)
    mortal.kill()
    assert refused(os.read, fd, 100) == "ENOTCONN"
    if state == PRE_COPY:
        assert refused(precopy_info, fd) == "ENOTCONN"
    assert refused(way.device.set_state, STOP) == "ENOTCONN"
    assert refused(os.read, fd, 100) == "ENODEV"  # the session is over
    is_dead(way)
    os.close(fd)


@inside()
def test_killed_while_it_resumes(mortal: Served) -> None:
    """What was written and did not arrive is an error of the next write, or of the change of state."""
    way = Attached("iommufd-cdev")
    fd = way.device.set_state(RESUMING)
    mortal.kill()
    deadline = time.monotonic() + 300
    while (answer := refused(os.write, fd, bytes(1000))) == "ok":
        assert time.monotonic() < deadline
    assert answer == "ENOTCONN"
    assert refused(way.device.set_state, RUNNING) == "ENOTCONN"
    is_dead(way)


@inside()
def test_killed_while_dma_is_logged(mortal: Served) -> None:
    """What it wrote last is not known any more: all that it could write to is dirty."""
    way = Attached("iommufd-cdev")
    way.map(0, Memory(4 * PAGE))
    way.map(0x10000, Memory(4 * PAGE), flags=1)  # it may not write there
    way.device.log_start((0, 1 << 20))
    assert way.device.log_report(0, 1 << 20) == set()
    mortal.kill()
    assert way.device.read(CONFIG, 0, 1) == b"\xff"
    assert way.device.log_report(0, 1 << 20) == {0, 1, 2, 3}
    way.device.log_stop()


@inside({"VFU_DEV_PRELOAD_TIMEOUT_MS": SILENCE_MS})
def silent(served: Served) -> None:
    way = Attached("type1")
    way.map(0, Memory(PAGE))
    served.pause()
    assert way.device.read(CONFIG, 0, 4) == b"\xff" * 4
    served.resume()
    is_dead(way)  # it stays dead: nobody can tell what became of the request


def test_a_server_that_does_not_answer_in_time_is_dead(
    serve_one: Callable[..., Served], run_inside: Callable[..., str]
) -> None:
    said = run_inside(silent, served=serve_one())
    assert f"no reply to command 9 within {SILENCE_MS} ms" in said


@inside({"VFU_DEV_PRELOAD_TIMEOUT_MS": SILENCE_MS})
def silent_for_posted_writes(served: Served) -> None:
    way = Attached("iommufd-cdev")
    served.pause()
    for _ in range(20000):  # more than a socket holds
        assert way.device.write(MEMORY_BAR, 0, b"12345678") == 8
    served.resume()
    is_dead(way)


def test_writes_without_replies_do_not_wait_for_ever(
    serve_one: Callable[..., Served], run_inside: Callable[..., str]
) -> None:
    assert "takes no messages" in run_inside(silent_for_posted_writes, served=serve_one())


@inside()
def test_a_server_that_serves_somebody_else_is_said_to_be_busy(served: Served) -> None:
    """The bind of another program, which waits for 2 s, fails in time; nothing hangs."""
    import subprocess
    import sys

    way = Attached("iommufd-cdev")
    script = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from vfio import *\n"
        "device = Device(os.open('/dev/vfio/devices/vfio-user0', os.O_RDWR))\n"
        "answer = refused(device.bind, Iommufd().fd)\n"
        "sys.exit(0 if answer != 'ok' else 1)\n"
    )
    argv = [sys.executable, "-c", script, os.path.dirname(__file__)]
    environment = os.environ | {"VFU_DEV_PRELOAD_TIMEOUT_MS": "2000"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert way.device.read(CONFIG, 0, 2) == b"VF"


@inside()
def test_one_dead_device_does_not_disturb_another(served: Served) -> None:
    """They share an address space; only one of them answers any more."""
    first = Attached("iommufd-cdev", 0)
    second = Attached("iommufd-cdev", 1, beside=first)
    first.map(0, Memory(PAGE))
    served.pause(0)
    try:
        second.device.write(MEMORY_BAR, 0, b"second")
        assert second.device.read(MEMORY_BAR, 0, 6) == b"second"
    finally:
        served.resume(0)
    assert first.device.read(CONFIG, 0, 2) == b"VF"
