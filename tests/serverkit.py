"""Real `vfu-dev serve` processes for tests of every folder; tests/conftest.py makes a fixture of them."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vfu_dev.client import ClientOptions, ControlClient, VfioUserDevice
from vfu_dev.client.digest import audit_over
from vfu_dev.vm.servers import DeviceServer, ServerOptions

# Whatever takes longer hangs, on a busy machine too. Tests wait for events; this ends a wait in vain.
PATIENCE_SECONDS = 300.0
VFU_DEV = [sys.executable, "-m", "vfu_dev"]
# For a device with a few KiB of state: read slowly, on a busy machine, they are above the default limit.
ANY_DOWNTIME = ClientOptions(downtime_limit_seconds=60.0)
ANY_DOWNTIME_ARGUMENTS = ("--downtime-limit", "60000")


def run_vfu_dev(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with this much more in its environment."""
    return subprocess.run(
        [*VFU_DEV, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
    )


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Return the first true value of `condition()`, asked every few milliseconds; fail naming `what`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


def runs(pid: int) -> bool:
    """Return whether a process has not ended. It may stay a zombie: not every PID 1 asks for its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def readable(fds: Iterable[int], seconds: float = PATIENCE_SECONDS) -> list[int]:
    """Return which of `fds` can be read, waiting for the first; select() does not take numbers above 1023."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(seconds * 1000)]


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """Return `count` bytes, fewer if the peer closes (MSG_WAITALL does not wait where there is a timeout)."""
    data = bytearray()
    while len(data) < count and (part := sock.recv(count - len(data))):
        data += part
    return bytes(data)


@dataclass
class RunningServer:
    """One `vfu-dev serve` process."""

    served: DeviceServer
    killed: bool = False
    status_expected: int | None = None  # of one that is made to end
    has_defect: bool = False  # its device has one, so there may be a traceback

    @property
    def socket(self) -> Path:
        """Its vfio-user socket."""
        return self.served.socket

    @property
    def control_path(self) -> Path:
        """Its control socket."""
        return self.served.control

    @property
    def log_path(self) -> Path:
        """What it writes to stdout and stderr."""
        return self.served.process.log

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Its process."""
        process = self.served.process.process
        assert process is not None
        return process

    def connect(self, *, timeout_seconds: float = PATIENCE_SECONDS, **options: Any) -> VfioUserDevice:
        """Connect as the server's one client, once it has let go of the client before."""
        wait_until(lambda: not self.status()["connected"], "the server drops its last client")
        return VfioUserDevice.connect(self.socket, timeout_seconds=timeout_seconds, **options)

    def control(self) -> ControlClient:
        """Connect to the control socket."""
        return ControlClient(self.control_path, timeout_seconds=PATIENCE_SECONDS)

    def status(self) -> dict[str, Any]:
        """Return the server's status."""
        with self.control() as control:
            return control.status()

    def audited(self) -> dict[str, Any]:
        """Return the status once the audit of the last save is over."""
        found: dict[str, Any] = wait_until(lambda: audit_over(s := self.status()) and s, "the audit is over")
        return found

    def log(self) -> str:
        """Return what the server wrote to stderr so far."""
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        """End the server without a chance to clean up (SIGKILL)."""
        self.killed = True
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the server did not stop on SIGTERM:\n{self.log()}")


ServerFactory = Callable[..., RunningServer]


@contextmanager
def short_folder() -> Iterator[Path]:
    """Yield a folder whose name leaves room in the 108 bytes of a socket address; pytest's own does not."""
    folder = Path(tempfile.mkdtemp(prefix="vfu-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def server_farm(library: Path, folder: Path) -> Iterator[ServerFactory]:
    """Yield a function that starts `vfu-dev serve` with the given options and waits until it answers.

    In the end every server must stop on SIGTERM with status 0 and without a traceback in its log.
    """
    servers: list[RunningServer] = []

    def start(*options: str, memory: str | None = "1M", name: str | None = None) -> RunningServer:
        size = ["--memory", memory] if memory else []
        server = _start(library, folder, name or f"dev{len(servers)}", [*options, *size])
        servers.append(server)
        return server

    try:
        yield start
    finally:
        statuses = [server.stop() for server in servers]
    for server, status in zip(servers, statuses, strict=True):
        expected = server.status_expected or (-signal.SIGKILL if server.killed else 0)
        assert status == expected, f"exit status {status}:\n{server.log()}"
        assert server.has_defect or "Traceback" not in server.log(), server.log()


def _start(library: Path, folder: Path, name: str, options: list[str]) -> RunningServer:
    given = ServerOptions(library=library, extra=tuple(options))
    served = DeviceServer(name, folder, folder, given)
    server = RunningServer(served)
    try:
        for pause in served.starting():
            time.sleep(pause)
        server.status()
    except BaseException:
        served.process.end()
        raise
    return server
