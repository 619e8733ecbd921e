"""Which socket is which: the control socket beside the device's, and what happens at the wrong one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, VFU_DEV, RunningServer, ServerFactory, run_vfu_dev, wait_until

from vfu_dev.client import ControlClient, VfioUserDevice


@pytest.fixture
def plain(library: Path, short_tmp: Path) -> Iterator[Path]:
    """A server as `vfu-dev serve --socket` alone starts it; the path of its socket."""
    path = short_tmp / "a.sock"
    arguments = ["serve", "--socket", path, "--memory", "1M", "--fill", "3", "--dirty-rate", "500p"]
    environment = os.environ | {"VFU_DEV_LIBVFIO_USER": str(library)}
    with subprocess.Popen(
        [*VFU_DEV, *map(str, arguments)], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"serving")
        yield path
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert not path.exists()
    assert not path.with_name("a.sock.ctl").exists()


def test_the_control_socket_is_beside_the_devices(plain: Path, serve: ServerFactory) -> None:
    """Every command finds it by either path, and the load of the command line runs."""
    control = plain.with_name("a.sock.ctl")
    assert control.is_socket()
    for path, pages in ((plain, 500), (control, 100)):
        status = run_vfu_dev("ctl", path, "load-status", "--json")
        assert status.returncode == 0, status.stderr
        assert json.loads(status.stdout)["load"]["rate_pages"] == pages
        watched = run_vfu_dev("top", "--once", "--json", path)
        assert json.loads(watched.stdout)["devices"][0]["control"] == str(control)
        loaded = run_vfu_dev(
            "load", "--control", path, "--dirty-rate", "100p", "--duration", "0.2", "--quiet"
        )
        assert loaded.returncode in (0, 3), loaded.stderr
        info = run_vfu_dev("info", path)
        assert info.returncode == 0, info.stderr
    destination = serve()
    moved = run_vfu_dev("migrate", control, destination.control_path)
    assert moved.returncode == 0, moved.stderr
    assert "by control" in moved.stdout


def test_none_serves_without_a_control_socket(library: Path, short_tmp: Path) -> None:
    path = short_tmp / "a.sock"
    arguments = ["serve", "--socket", path, "--memory", "64K", "--control", "none"]
    environment = os.environ | {"VFU_DEV_LIBVFIO_USER": str(library)}
    with subprocess.Popen(
        [*VFU_DEV, *map(str, arguments)], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [one.name for one in short_tmp.iterdir()] == ["a.sock"]
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


def elsewhere(serve: ServerFactory, folder: Path) -> tuple[RunningServer, Path]:
    """Return a server and another name of its device's socket, beside which there is no control socket."""
    server = serve()
    alone = folder / "device"
    alone.symlink_to(server.socket)
    return server, alone


def test_a_command_at_the_devices_socket_is_told_so(serve: ServerFactory, short_tmp: Path) -> None:
    """And the server says one line, without an error, and goes on."""
    server, alone = elsewhere(serve, short_tmp)
    done = run_vfu_dev("ctl", alone, "status")
    assert done.returncode == 1
    *hints, said = done.stderr.splitlines()
    assert "name its control socket: device.ctl beside it" in said
    assert "timed out" not in said  # not by the 60 s that an answer may take, but by what the server did
    # The hints are of a server that gets no processor for a second.
    assert all("has not read the command yet" in hint or "no answer for" in hint for hint in hints)
    with server.connect() as device:
        assert device.region_read(0, 0, 4) == b"VFUD"
    log = server.log()
    assert "ERROR" not in log
    assert log.count("sent no VERSION message") == 1
    assert server.status()["connected"] is False


def test_top_polls_once_what_is_no_control_socket(serve: ServerFactory, short_tmp: Path) -> None:
    """Each poll would take the place of the device's client; it waits for the control socket."""
    server, alone = elsewhere(serve, short_tmp)
    arguments = [*VFU_DEV, "top", "--json", "--interval", "0.1", str(alone)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            (polled,) = json.loads(process.stdout.readline())["devices"]
            assert "name its control socket" in polled["error"]
        alone.with_name("device.ctl").symlink_to(server.control_path)
        while (polled := json.loads(process.stdout.readline())["devices"][0])["error"] is not None:
            pass
        assert polled["state"] == "RUNNING"
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert server.log().count("sent no VERSION message") == 1


def test_a_command_at_the_socket_of_a_busy_device_is_told_so(serve: ServerFactory, short_tmp: Path) -> None:
    """The server turns it away, and its client does not notice."""
    server, alone = elsewhere(serve, short_tmp)
    with server.connect() as device:
        done = run_vfu_dev("ctl", alone, "status")
        assert done.returncode == 1
        assert "name its control socket: device.ctl beside it" in done.stderr
        assert device.region_read(0, 0, 4) == b"VFUD"


def test_a_command_at_a_socket_that_nobody_accepts_from_is_told_so(short_tmp: Path) -> None:
    """Nothing comes back from a stuck server: what may be wrong is said meanwhile."""
    path = short_tmp / "device"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        command = [*VFU_DEV, "ctl", str(path), "status"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert "the server has not read the command yet" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_SECONDS) == 130


def test_a_client_at_the_control_socket_is_told_so(serve: ServerFactory, short_tmp: Path) -> None:
    """By what answers, not by a timeout; the server does not mind."""
    server = serve()
    alone = short_tmp / "control"
    alone.symlink_to(server.control_path)
    for command in (["info", alone, "--timeout", "60"], ["migrate", alone, server.socket]):
        done = run_vfu_dev(*command)
        assert done.returncode == 1
        assert "a control socket" in done.stderr
        assert "name the device's socket" in done.stderr
    assert "ERROR" not in server.log()
    assert "WARNING" not in server.log()


def test_a_second_server_does_not_disturb_the_first(serve: ServerFactory, library: Path) -> None:
    """It looks whether somebody listens; that is no client, and no broken one."""
    server = serve()
    environment = os.environ | {"VFU_DEV_LIBVFIO_USER": str(library)}
    arguments = [*VFU_DEV, "serve", "--socket", str(server.socket), "--memory", "64K"]
    second = subprocess.run(
        arguments, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=environment
    )
    assert second.returncode == 1
    assert "a server is alive there" in second.stderr
    wait_until(lambda: server.status()["connected"] is False, "the server has looked")
    with server.connect() as device:
        assert device.region_read(0, 0, 4) == b"VFUD"
    assert "ERROR" not in server.log()
    assert "does not speak" not in server.log()
    with server.control() as control:
        assert control.command("figures")["snapshot"]["counters"]["protocol_errors"] == 0


def test_qmp_is_recognised_too(short_tmp: Path) -> None:
    """It greets whoever connects."""
    path = short_tmp / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with subprocess.Popen(
            [*VFU_DEV, "info", str(path), "--timeout", "60"], stderr=subprocess.PIPE, text=True
        ) as process:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
                assert process.stderr is not None
                assert "QEMU's QMP" in process.stderr.read()
            assert process.wait(PATIENCE_SECONDS) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "command",
    [
        "info PATH --timeout 60",
        "migrate PATH PATH2",
        "load --socket PATH --dirty-rate 1M",
        "ctl PATH status",
    ],
)
def test_an_interrupted_command_has_the_signals_status(
    command: str, number: signal.Signals, short_tmp: Path
) -> None:
    """Also where it waits for a server that never answers; `timeout` and CI send SIGTERM."""
    path = short_tmp / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        words = [word.replace("PATH", str(path)) for word in command.split()]
        with subprocess.Popen([*VFU_DEV, *words], stderr=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(1)
                process.send_signal(number)
                assert process.wait(PATIENCE_SECONDS) == 128 + number
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()


def test_the_device_and_the_control_client_agree_on_the_names(serve: ServerFactory) -> None:
    """What the package's own classes connect to is what the paths say."""
    server = serve()
    with ControlClient(server.control_path, timeout_seconds=PATIENCE_SECONDS) as control:
        assert control.status()["name"]
        assert not control.is_unread()
    with VfioUserDevice.connect(server.socket, timeout_seconds=PATIENCE_SECONDS) as device:
        assert device.version.major == 0
