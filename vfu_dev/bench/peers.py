"""The servers that are measured: ours as anybody starts it, and the reference server in C."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfu_dev.builds import artifact
from vfu_dev.client.listening import is_listening, socket_folder
from vfu_dev.errors import VfuDevError

START_SECONDS = 120.0
STOP_SECONDS = 30.0


class BenchError(VfuDevError):
    """A server that is to be measured does not start, or ended."""


class Served:
    """One server process and its socket."""

    def __init__(self, name: str, argv: list[str], folder: Path, *, port: int | None = None) -> None:
        self.name = name
        self.socket = folder / f"{name}.sock"
        self.control = folder / f"{name}.ctl"  # of ours, where asked for
        self.port = port
        self._log = folder / f"{name}.log"
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env=env)
        deadline = time.monotonic() + START_SECONDS
        while not is_listening(self.socket):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{name} does not start: {self._log.read_text(errors='replace')[-500:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Bench:
    """Where servers are started; at its end all of them are stopped and their files removed."""

    def __init__(self) -> None:
        self._library = artifact("libvfio-user", build=True)
        self._reference = artifact("libvfio-user-reference", build=True)
        self._folder = socket_folder("vfu-bench-")
        self._servers: list[Served] = []

    def _add(self, server: Served) -> Served:
        self._servers.append(server)
        return server

    def ours(self, memory_mib: int, *options: str, fill: int = 1, metrics: bool = False) -> Served:
        """Start `vfu-dev serve`; `fill` 0 leaves the memory empty, as a destination's is.

        Args:    metrics: with a metrics port and a control socket.
        """
        name = f"ours{len(self._servers)}"
        argv = [sys.executable, "-m", "vfu_dev", "serve", "--socket", str(self._folder / f"{name}.sock")]
        argv += ["--memory", f"{memory_mib}M", "--library", str(self._library), "--log-level", "WARNING"]
        argv += ["--name", name, "--fill", str(fill), *options]
        port = free_port() if metrics else None
        if port:
            argv += ["--metrics-port", str(port), "--control", str(self._folder / f"{name}.ctl")]
        return self._add(Served(name, argv, self._folder, port=port))

    def reference(self, memory_mib: int, *, fill: int = 1) -> Served:
        """Start the reference server."""
        name = f"c{len(self._servers)}"
        argv = [str(self._reference), str(self._folder / f"{name}.sock"), str(memory_mib)]
        return self._add(Served(name, [*argv, *([str(fill)] if fill else [])], self._folder))

    def stop(self, server: Served) -> None:
        """End one server before its time."""
        self._servers.remove(server)
        server.stop()

    def close(self) -> None:
        """End everything."""
        for server in self._servers:
            server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def bench() -> Iterator[Bench]:
    """Yield a place to start servers in. Raises: BuildError: library or reference server cannot be built."""
    one = Bench()
    try:
        yield one
    finally:
        one.close()


def free_port() -> int:
    """Return a TCP port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def machine() -> dict[str, object]:
    """Return what figures depend on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    load = os.getloadavg()[0]
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "load_average": round(load, 2),
        "kernel": os.uname().release,
    }
