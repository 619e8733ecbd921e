"""`vfu-dev serve` as a process: how it starts, stops, and outlives its clients."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serverkit import PATIENCE_SECONDS, RunningServer, ServerFactory, run_vfu_dev, wait_until

from vfu_dev import libvfio_user
from vfu_dev.builds import artifact
from vfu_dev.client import ClientCommandError
from vfu_dev.device import Bar
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.errors import ConfigError, VfuDevError
from vfu_dev.logs import RateLimit
from vfu_dev.server import Server
from vfu_dev.server.door import Access
from vfu_dev.uapi import VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR2_REGION_INDEX, DeviceState

IRQ_RAISE = 0x20


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `vfu-dev serve` for a case that is expected to end by itself."""
    return run_vfu_dev("serve", *arguments, VFU_DEV_LIBVFIO_USER=str(library))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--memory", "10K"], "memory memory: 10240 bytes are not one or more pages of 4096"),
        (["--memory", "lots"], "not a size: 'lots'"),
        (["--page-size", "1K"], "--page-size 1024: at least 4096"),
        (["--page-size", "6K", "--memory", "6M"], "not a power of two"),
        (["--fill", "seed"], "'seed' is not a number, decimal or 0x hexadecimal"),
        (["--fill", "-1"], "fill -1: expected a seed from 0 to 0xffffffffffffffff"),
        (["--memory", "=64K"], "--memory =64K: memory: a name is missing"),
        (
            ["--name", "a\nb\x1b[2J"],
            r"device: name 'a\nb\x1b[2J': control characters are not allowed",
        ),
        (["--library", "/nonexistent.so"], "cannot open libvfio-user"),
        (["--control", "/nonexistent/c"], "there is no folder /nonexistent"),
    ],
)
def test_impossible_options_are_one_line_and_leave_nothing(
    library: Path, short_tmp: Path, options: list[str], text: str
) -> None:
    path = short_tmp / "s"
    result = run(library, "--socket", str(path), *options)
    assert result.returncode != 0
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert not path.exists()


# `vfu-dev serve` with argv[1] free descriptors. Its modules are loaded before: an import without a
# free descriptor fails with an error of Python's own.
FEW_DESCRIPTORS = """
import os, resource, sys
import vfu_dev.cli.serve, vfu_dev.server
free, socket = int(sys.argv[1]), sys.argv[2]
first = os.dup(0)
os.close(first)
resource.setrlimit(resource.RLIMIT_NOFILE, (first + free, first + free))
vfu_dev.cli.main(["serve", "--socket", socket, "--memory", "64K"])
"""


@pytest.mark.parametrize("free", range(4))
def test_a_server_without_free_descriptors_says_so(library: Path, short_tmp: Path, free: int) -> None:
    """Wherever it finds out: one line that names the limit, and never that something is not built."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, str(free), str(short_tmp / "s")],
        env=os.environ | {"VFU_DEV_LIBVFIO_USER": str(library)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.startswith("vfu-dev: ")
    assert done.stderr.endswith("Too many open files (see ulimit -n)\n")
    assert len(done.stderr.splitlines()) == 1
    assert list(short_tmp.iterdir()) == []


class Failing(ReferenceDevice):
    """A device that cannot be set up."""

    def region_handler(self, bar: Bar) -> Callable[[memoryview, int, bool], None]:
        """Fail, in the middle of what the library is told."""
        raise ConfigError("no handler")


def test_a_server_that_cannot_be_made_leaves_nothing_behind(library: Path, short_tmp: Path) -> None:
    """No descriptor, no socket, no worker of a device that somebody else may serve."""
    loaded = libvfio_user.open_library(library)
    taken = short_tmp / "file"
    taken.write_text("somebody's")
    device, failing = ReferenceDevice(memory_bytes=4096), Failing(memory_bytes=4096)
    workers = list(device.workers)
    path = short_tmp / "s"
    descriptors = set(os.listdir("/proc/self/fd"))
    for served, socket_path, control_path, text in (
        (device, taken, None, "exists and is not a socket"),
        (device, short_tmp / "x" / "s", None, "there is no folder"),
        (device, Path("/proc/s"), None, "socket /proc/s"),
        (failing, path, None, "no handler"),
        (device, path, taken, "exists and is not a socket"),
        (device, path, Path("/proc/c"), "control socket /proc/c"),
    ):
        with pytest.raises(VfuDevError, match=text):
            Server(served, loaded, socket_path, control_path)
        assert set(os.listdir("/proc/self/fd")) == descriptors
        assert os.listdir(short_tmp) == ["file"]
        assert device.workers == workers
    server = Server(device, loaded, path, short_tmp / "c")
    assert path.is_socket()
    server.close()
    assert os.listdir(short_tmp) == ["file"]
    for one in (device, failing):
        one.close()


def test_a_foreign_librarys_socket_that_cannot_be_given_away_is_closed(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a library listens from the moment on at which it is made."""

    def refuse(*_: object, **_more: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    loaded = libvfio_user.open_library(artifact("libvfio-user-reduced", build=True))
    device = ReferenceDevice(memory_bytes=4096)
    monkeypatch.setattr(os, "chown", refuse)
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"--socket-group 1: .* cannot be given to it"):
        Server(device, loaded, short_tmp / "s", access=Access(group=1))
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert os.listdir(short_tmp) == []
    device.close()


def test_a_signal_in_the_middle_of_the_loop_waits_for_its_end_to_be_logged(
    library: Path, short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit of log lines may be the place: it goes through a dictionary that a line would change."""
    device = ReferenceDevice(memory_bytes=4096)
    server = Server(device, libvfio_user.open_library(library), short_tmp / "s")
    logged: list[list[str]] = []

    class Interrupted(RateLimit):
        """Asked by the loop in each turn."""

        def timeout(self) -> float | None:
            """Be interrupted."""
            signal.raise_signal(signal.SIGTERM)
            logged.append([record.getMessage() for record in caplog.records])
            return super().timeout()

    server.log_limit = Interrupted(logging.NullHandler())
    try:
        with caplog.at_level(logging.INFO, logger="vfu_dev.server"):
            server.run()
    finally:
        gc.unfreeze()
        server.close()
        device.close()
    assert logged == [[]]
    assert [record.getMessage() for record in caplog.records] == [f"{device.name}: SIGTERM, stopping"]


def test_sigterm_in_the_middle_of_a_migration_is_a_clean_stop(serve: ServerFactory) -> None:
    server = serve("--fill", "1")
    with server.connect() as device:
        device.migration.set_state(DeviceState.PRE_COPY)
        device.migration.read(10_000)
        assert server.stop() == 0
    assert not server.socket.exists()
    assert not server.control_path.exists()


def test_sigint_and_quit_are_clean_stops_too(serve: ServerFactory) -> None:
    first, second = serve(), serve()
    first.process.send_signal(signal.SIGINT)
    with second.control() as control:
        control.command("quit")
    for server in (first, second):
        assert server.process.wait(PATIENCE_SECONDS) == 0
        assert not server.socket.exists()


def test_a_live_servers_socket_is_an_error_and_a_dead_ones_is_taken_over(
    library: Path, serve: ServerFactory
) -> None:
    server = serve(name="twice")
    for option, path in [("--socket", server.socket), ("--control", server.control_path)]:
        arguments = ["--socket", str(server.socket) + ".other", option, str(path)]
        result = run(library, *arguments)
        assert result.returncode == 1
        assert "a server is alive there" in result.stderr
    assert server.status()["state"] == "RUNNING"
    server.kill()
    assert server.socket.exists()
    again = serve(name="twice")
    with again.connect() as device:
        assert bytes(device.region_read(0, 0, 4)) == b"VFUD"


def test_a_client_lost_in_pre_copy_leaves_a_device_that_can_be_migrated(serve: ServerFactory) -> None:
    """The record says why the migration ended; the next client completes one."""
    server = serve("--fill", "1")
    device = server.connect()
    device.migration.set_state(DeviceState.PRE_COPY)
    device.migration.read(100_000)
    device.close()
    status = wait_until(lambda: (s := server.status())["state"] == "RUNNING" and s, "the device runs again")
    assert status["save"]["status"] == "aborted"
    assert status["save"]["error"] == "connection lost"
    with server.connect() as device:
        device.migration.set_state(DeviceState.STOP_COPY)
        while device.migration.read(1 << 20):
            pass
        device.migration.set_state(DeviceState.STOP)
        status = server.audited()
        assert (status["save"]["status"], status["save"]["audited"]) == ("completed", True)
        assert [t["to"] for t in status["transitions"]][-4:] == ["RUNNING_P2P", "STOP", "STOP_COPY", "STOP"]


def leave_all_sent(server: RunningServer) -> None:
    """Have a client read the whole state, and go."""
    with server.connect() as device:
        device.migration.set_state(DeviceState.STOP_COPY)
        while device.migration.read(1 << 20):
            pass


def test_a_client_that_leaves_does_not_end_the_audit(serve: ServerFactory) -> None:
    """Nobody writes to the memory of a device without a client; what can be mapped is another matter."""
    trapped, mapped = serve("--fill", "1"), serve("--fill", "1", "--access", "mmap")
    for server, expected in ((trapped, True), (mapped, None)):
        leave_all_sent(server)
        wait_until(lambda s=server: s.status()["state"] == "RUNNING", "the device runs again")
        save = server.audited()["save"]
        assert (save["status"], save["audited"]) == ("sent", expected)


def test_the_next_client_finds_no_audit_under_way(serve: ServerFactory) -> None:
    """256 MiB take 50 ms, in steps that its MMIO would have to wait for."""
    server = serve("--fill", "1", memory="256M")
    leave_all_sent(server)
    with server.connect():
        assert server.status()["save"]["audited"] is not False


def test_initial_is_what_the_operator_says(serve: ServerFactory) -> None:
    server = serve("--fill", "1", "--initial", "64K")
    with server.connect() as device:
        device.migration.set_state(DeviceState.PRE_COPY)
        info = device.migration.precopy_info()
        # The schema and framing come on top.
        assert 64 << 10 < info.initial_bytes < 68 << 10
        assert info.dirty_bytes > (1 << 20) - (64 << 10)


def test_digest_of_a_quiet_device_is_stable(serve: ServerFactory) -> None:
    one, two = serve("--fill", "7"), serve("--fill", "7")
    with one.control() as first, two.control() as second:
        results = [first.command("digest"), second.command("digest")]
    assert results[0]["digest"] == results[1]["digest"]
    assert all(result["stable"] for result in results)


def flood_is_summed_up(server: RunningServer, about: str, count: int) -> None:
    """Wait until the log's few lines that hold `about` account for `count` of them, no more and no less."""

    def told() -> list[dict[str, Any]]:
        lines = server.log().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if about in entry["message"]]

    def accounted() -> bool:
        return sum(1 + entry.get("left_out", 0) for entry in told()) >= count

    wait_until(accounted, "the flood is summed up")
    assert sum(1 + entry.get("left_out", 0) for entry in told()) == count
    assert len(told()) < count // 10


def test_a_guest_that_hammers_on_a_register_does_not_fill_the_log(serve: ServerFactory) -> None:
    """MSI-X is off, so each write is an interrupt that gets nowhere; the log says how many there were."""
    server, count = serve("--log-format", "json"), 3000
    with server.connect() as device:
        for _ in range(count):
            device.region_write(VFIO_PCI_BAR0_REGION_INDEX, IRQ_RAISE, bytes(4))
        flood_is_summed_up(server, "interrupt", count)


def test_a_client_that_sends_nonsense_does_not_fill_the_log(serve: ServerFactory) -> None:
    """Each message of a command that does not exist is refused; the log says how many there were."""
    server, count = serve("--log-format", "json"), 3000
    with server.connect() as device:
        for _ in range(count):
            with pytest.raises(ClientCommandError):
                device.connection.call(99)
        flood_is_summed_up(server, "cmd99", count)


def test_the_server_takes_the_descriptors_that_it_may(serve: ServerFactory) -> None:
    """2048 interrupts need as many; the usual limit of 1024 can be raised without asking anybody."""
    soft, hard = resource.prlimit(serve().process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_what_64_kib_pages_cannot_map_is_trapped(serve: ServerFactory) -> None:
    """The area that can be mapped ends at a whole page of any client's; the rest is trapped memory."""
    server = serve("--access", "mmap", "--fill", "1", memory="100K")
    with server.connect() as device:
        (area,) = device.region_info(VFIO_PCI_BAR2_REGION_INDEX).areas
        assert area == (0, 64 << 10)
        device.region_write(VFIO_PCI_BAR2_REGION_INDEX, 99 << 10, b"behind it")
        assert device.region_read(VFIO_PCI_BAR2_REGION_INDEX, 99 << 10, 9) == b"behind it"
        device.migration.set_state(DeviceState.STOP_COPY)
        while device.migration.read(1 << 20):
            pass
        device.migration.set_state(DeviceState.STOP)
        assert server.audited()["save"]["audited"] is True
