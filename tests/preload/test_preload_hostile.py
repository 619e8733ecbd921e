"""Servers that lie: whatever one sends, the program gets errors and goes on, and the sanitizers find nothing.

The liar is `vfu-dev hostile`, which is also what our own client and QEMU's are tried against. By default
a fixed selection of its lies; VFU_DEV_HOSTILE=all tries every one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from inside import Served, inside
from liarkit import liar, lies_of
from vfio import (
    CONFIG,
    DATA_EVENTFD,
    DATA_NONE,
    MSIX,
    PAGE,
    PRE_COPY,
    PRECOPY_INFO_V2,
    RESUMING,
    RUNNING,
    SET,
    STOP_COPY,
    TRIGGER,
    Attached,
    Memory,
    precopy_info,
    refused,
)

# One lie in this number is tried by default.
DEFAULT_SHARE = 32
PHASES = ("attach", "run", "save", "resume")


def attempt(way: Attached) -> None:
    """Do what QEMU does with a device, in its order; every call may fail, none may do harm."""
    device = way.device
    memory = Memory(16 * PAGE)
    private = Memory(16 * PAGE, shared=False)
    for call in (
        lambda: way.map(0, memory),
        lambda: way.map(0x100000, private),
        device.info,
        *(lambda index=index: device.region(index) for index in range(10)),
        *(lambda index=index: device.irq(index) for index in range(6)),
        lambda: device.read(CONFIG, 0, 256),
        lambda: device.read(2, 0, 65536),
        lambda: device.write(2, 0, b"12345678"),
        lambda: device.write(CONFIG, 4, b"\6\0"),
        lambda: device.set_irqs(DATA_EVENTFD | TRIGGER, MSIX, 0, 1, (-1).to_bytes(4, "little", signed=True)),
        lambda: device.set_irqs(DATA_NONE | TRIGGER, MSIX, 0, 0),
        device.reset,
        device.migration_flags,
        device.state,
        device.data_size,
        lambda: device.feature(SET | PRECOPY_INFO_V2),
        lambda: device.log_start((0, 1 << 20)),
        lambda: device.log_report(0, 1 << 20),
        lambda: way.unmap(0x100000, 16 * PAGE),
        lambda: save(way),
        lambda: resume(way),
        device.log_stop,
        lambda: device.read(2, 0, 8),
    ):
        with contextlib.suppress(OSError):
            call()


def save(way: Attached) -> None:
    fd = way.device.set_state(PRE_COPY)
    for _ in range(4):
        refused(precopy_info, fd)
        refused(os.read, fd, 1 << 20)
    refused(way.device.set_state, STOP_COPY)
    for _ in range(8):
        refused(os.read, fd, 1 << 20)
    refused(way.device.set_state, RUNNING)
    os.close(fd)


def resume(way: Attached) -> None:
    fd = way.device.set_state(RESUMING)
    for _ in range(4):
        refused(os.write, fd, bytes(40000))
    refused(way.device.set_state, RUNNING)
    os.close(fd)


@inside({"VFU_DEV_PRELOAD_TIMEOUT_MS": "200"})
def meet(served: Served) -> None:
    for path in ("iommufd-cdev", "type1"):
        try:
            way = Attached(path)  # type: ignore[arg-type]
        except OSError:
            continue  # refused, with a message
        attempt(way)
        way.close()


@inside()
def meet_honest(served: Served) -> None:
    """The same steps, which work but for one: zeros are no state, and take the device to ERROR."""
    way = Attached("iommufd-cdev")
    attempt(way)
    way.device.reset()
    assert way.device.read(CONFIG, 0, 4) == b"VFUD"
    assert way.device.migration_flags() == 5
    fd = way.device.set_state(PRE_COPY)
    assert len(os.read(fd, 1 << 20)) > 60000
    assert precopy_info(fd)[1] >= 0
    way.device.set_state(RUNNING)


def test_an_honest_server_is_served(short_tmp: Path, run_inside: Callable[..., str]) -> None:
    """So what the others do to it is their lies' doing."""
    with liar(short_tmp, None) as other:
        said = run_inside(meet_honest, served=Served([str(other.socket)], [other.pid]))
    assert "dead" not in said


@pytest.mark.parametrize("lie", [lie for phase in PHASES for lie in lies_of(phase, DEFAULT_SHARE)])
def test_a_lie_does_no_harm(lie: str, short_tmp: Path, run_inside: Callable[..., str]) -> None:
    """Errors, or none where the lie is none to a program; no crash, no hang, nothing for the sanitizers."""
    with liar(short_tmp, lie) as other:
        run_inside(meet, served=Served([str(other.socket)], [other.pid]))
