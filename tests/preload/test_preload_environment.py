"""What the environment asks for, and what the library says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from inside import Served, inside
from liarkit import liar
from preloadkit import run_preloaded
from vfio import (
    CONFIG,
    LOG_START,
    MIGRATION,
    PAGE,
    PRE_COPY,
    PROBE,
    RUNNING,
    SET,
    Attached,
    Memory,
    refused,
)
from vfiodriver import DONE, Driver


def run(
    script: str, environment: dict[str, str], sockets: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run_preloaded([sys.executable, "-S", "-c", script], sockets or [], environment)


def test_without_a_socket_it_does_nothing() -> None:
    """The paths are the kernel's own, whatever it has there."""
    script = "import os; print(os.path.exists('/dev/iommu'), os.access('/dev/iommu', 0))"
    done = run(script, {"VFU_DEV_PRELOAD_FD0": "100", "VFU_DEV_PRELOAD_IOMMUFD": "101"})
    assert done.returncode == 0
    words = done.stdout.split()
    assert words[0] == words[1]
    assert done.stderr == ""


def test_variables_that_make_no_sense_are_said_and_ignored() -> None:
    """Each by its name and value, with what it may be."""
    done = run(
        "pass",
        {
            "VFU_DEV_PRELOAD_FD0": "two",
            "VFU_DEV_PRELOAD_IOMMUFD": "1",
            "VFU_DEV_PRELOAD_TIMEOUT_MS": "0",
            "VFU_DEV_PRELOAD_DMA": "fast",
            "VFU_DEV_PRELOAD_CPR": "maybe",
            "VFU_DEV_PRELOAD_FAULT": "all",
            "VFU_DEV_PRELOAD_LOG": "/no/such/folder/log",
        },
        ["/tmp/no-such.sock"],
    )
    assert done.returncode == 0
    told = (
        "FD0=two",
        "IOMMUFD=1",
        "TIMEOUT_MS=0",
        "DMA=fast",
        "CPR=maybe",
        "FAULT=all",
        "LOG=/no/such/folder/log",
    )
    for name in told:
        assert f"vfio-preload: VFU_DEV_PRELOAD_{name}: " in done.stderr


def test_the_list_of_sockets_ends_with_the_first_that_is_missing() -> None:
    script = "import os; print([n for n in range(4) if os.path.exists(f'/dev/vfio/devices/vfio-user{n}')])\n"
    script += "for n in range(4):\n"
    script += " try: print(os.open(f'/dev/vfio/devices/vfio-user{n}', 2) > 2)\n except OSError: print(n)"
    done = run(script, {"VFU_DEV_PRELOAD_SOCKET3": "/tmp/d"}, ["/tmp/a", "/tmp/b"])
    assert done.stdout.split()[1:] == ["True", "True", "2", "3"]


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/stderr"})
def one_of_each(served: Served) -> None:
    way = Attached("iommufd-cdev")
    way.map(0, Memory(PAGE))
    way.device.write(2, 0, b"\x11\x22")
    assert way.device.read(CONFIG, 0, 4) == b"VFUD"
    fd = way.device.set_state(PRE_COPY)
    os.read(fd, 100)
    way.device.set_state(RUNNING)
    os.close(fd)
    os.dup(way.device.fd)


def test_the_log_has_what_was_asked_and_answered(served: Served, run_inside: Callable[..., str]) -> None:
    """And how often each symbol was called for us: a call that went past would be missing there."""
    said = run_inside(one_of_each, served=served)
    for line in (
        r"open /dev/vfio/devices/vfio-user0: \d+ \(ok\)",
        r"device 0: DMA_MAP \[0, \+0x1000\) flags 0x3 by descriptor: ok",
        r"device 0: region 2 write 0, 2 bytes, value 0x2211: ok",
        r"device 0: region 7 read 0, 4 bytes, value 0x44554656: ok",
        r"device 0: state 2 -> 6, data_fd \d+: ok",
        r"device 0: MIG_DATA_READ of 100 bytes: 100 \(ok\)",
        r"ioctl \d+ \(iommufd\) 0x3b85: 0 \(ok\)",
    ):
        assert re.search(line, said), line
    calls = {name: int(count) for name, count in re.findall(r"calls of (\w+): (\d+)", said)}
    assert calls.pop("ioctl") == len(re.findall(r" ioctl \d+ \(", said))
    assert calls["close"] >= 1
    del calls["close"]
    # CPython is built against a C library that calls them so; it makes no other calls on these descriptors.
    assert calls in ({"open64": 2, "read": 1, "pread64": 1, "pwrite64": 1, "dup": 1},
                     {"open64": 2, "read": 1, "pread64": 1, "pwrite64": 1, "fcntl64": 1},
                     {"open64": 2, "read": 1, "pread64": 1, "pwrite64": 1, "fcntl": 1})  # fmt: skip


# --- which way DMA goes -------------------------------------------------------------------------------------


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/stderr"})
def without_log(served: Served) -> None:
    device = Attached("iommufd-cdev")
    memory = Memory(64 * PAGE)
    device.map(0, memory)
    assert refused(device.device.feature, PROBE | SET | LOG_START) == "ok"


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/stderr", "VFU_DEV_PRELOAD_DMA": "mapped"})
def without_log_mapped(served: Served) -> None:
    way = Attached("iommufd-cdev")
    way.map(0, Memory(64 * PAGE))
    way.map(0x100000, Memory(PAGE), flags=1)
    way.device.log_start((0, 1 << 21))
    for _ in range(2):  # and again each time
        assert way.device.log_report(0, 1 << 21) == set(range(64))
    way.device.log_stop()


@pytest.fixture
def no_log(short_tmp: Path) -> Iterator[Served]:
    """A server that migrates and keeps no log of its DMA."""
    with liar(short_tmp, "feature-log-start-error") as other:
        yield Served([str(other.socket)], [other.pid])


def test_without_the_servers_log_dma_goes_by_message(no_log: Served, run_inside: Callable[..., str]) -> None:
    """Nothing else can tell which pages it wrote to; the library says so."""
    said = run_inside(without_log, served=no_log)
    assert "keeps no log of its DMA: all of it goes by message, so that dirty pages are known" in said
    assert "DMA_MAP [0, +0x40000) flags 0x3 by message: ok" in said


def test_or_all_memory_is_dirty_where_descriptors_are_asked_for(
    no_log: Served, run_inside: Callable[..., str]
) -> None:
    """For a server that can do no DMA by message."""
    said = run_inside(without_log_mapped, served=no_log)
    assert "all of its memory is reported as dirty" in said
    assert "DMA_MAP [0, +0x40000) flags 0x3 by descriptor: ok" in said


@inside({"VFU_DEV_PRELOAD_DMA": "message", "VFU_DEV_PRELOAD_LOG": "/dev/stderr"})
def all_by_message(served: Served) -> None:
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    memory = Memory(4 * PAGE)
    way.map(0, memory)
    way.device.log_start((0, 4 * PAGE))
    assert driver.fill(PAGE, PAGE) == DONE
    assert memory[PAGE : PAGE + 4] == b"\x5a" * 4
    assert way.device.log_report(0, 4 * PAGE) == {1}
    assert refused(way.device.feature, PROBE | MIGRATION) == "ok"


def test_no_descriptor_is_given_where_none_is_wanted(served: Served, run_inside: Callable[..., str]) -> None:
    """For a server that is not trusted with them."""
    said = run_inside(all_by_message, served=served)
    assert "by message: ok" in said
    assert "by descriptor" not in said
