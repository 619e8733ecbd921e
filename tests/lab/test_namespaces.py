"""Hosts in namespaces: joined by a link, and gone with whoever made them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, runs, wait_until

from vfu_dev.vm.namespaces import ADDRESSES, INTERFACE, NamespaceError, Namespaces, connect

LISTEN = (
    f"import socket; s = socket.create_server(('{ADDRESSES[1]}', 4000)); print('up', flush=True); s.accept()"
)
CALL = f"import socket; socket.create_connection(('{ADDRESSES[1]}', 4000), 30)"
# What crashes: it makes two hosts, says how they are called, and stays.
MAKER = """
import time
from vfu_dev.vm.namespaces import Namespaces, connect
hosts = Namespaces("net"), Namespaces("net", "mount", "uts", "pid")
connect(*hosts)
print(*(host.pid for host in hosts), flush=True)
time.sleep(1000)
"""


@pytest.fixture
def pair() -> Iterator[tuple[Namespaces, Namespaces]]:
    try:
        first = Namespaces("net")
    except NamespaceError as error:
        pytest.skip(str(error))
    with first, Namespaces("net", "pid", "mount", "uts") as second:
        connect(first, second)
        yield first, second


def test_one_host_reaches_the_other(pair: tuple[Namespaces, Namespaces]) -> None:
    """By TCP over the link, and nobody else does: the address is unknown outside."""
    first, second = pair
    with subprocess.Popen(
        second.enter([sys.executable, "-c", LISTEN]), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        here = subprocess.run(["ip", "address"], capture_output=True, text=True, check=True).stdout
        assert INTERFACE not in here
        assert str(ADDRESSES[0]) not in here
        first.run(sys.executable, "-c", CALL)
        assert server.wait(PATIENCE_SECONDS) == 0


def test_a_pid_namespace_is_a_host_of_its_own(pair: tuple[Namespaces, Namespaces]) -> None:
    """It has its own name and processes, and orphans leave no zombie."""
    _, host = pair
    host.run("hostname", "elsewhere")
    assert host.run("hostname") == "elsewhere\n"
    assert os.uname().nodename != "elsewhere"
    host.run("sh", "-c", "sleep 0 & exec true")
    wait_until(lambda: "sleep" not in host.run("ps", "ax"), "the orphan is collected")
    with pytest.raises(NamespaceError, match="exit 3: 3"):
        host.run("sh", "-c", "exit 3")


def test_closed_they_take_everything_along(pair: tuple[Namespaces, Namespaces]) -> None:
    """What still runs in a PID namespace ends with it; closing twice is fine."""
    _, host = pair
    left = subprocess.Popen(host.enter(["sleep", "1000"]))
    wait_until(lambda: "sleep" in host.run("ps", "ax"), "it runs")
    host.close()
    assert left.wait(PATIENCE_SECONDS) != 0
    host.close()


def test_a_crash_leaves_nothing(pair: tuple[Namespaces, Namespaces]) -> None:
    """Killed outright, the maker's namespaces end with their holders: no process is left in them."""
    with subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        holders = [int(word) for word in maker.stdout.readline().split()]
        spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in holders}
        assert len(spaces) == 2
        maker.send_signal(signal.SIGKILL)
    for pid in holders:
        wait_until(lambda pid=pid: not runs(pid), "the holder has ended")

    def left() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*/ns/net"):
            try:
                found.append(os.readlink(process))
            except OSError:
                continue  # it has ended meanwhile
        return [one for one in found if one in spaces]

    wait_until(lambda: not left(), "nobody is left in them")
