"""The servers that are measured: `vfu-dev serve`, and the peer in C (native/bench)."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.bench.machine import keep_server
from vfu_dev.builds import artifact
from vfu_dev.client.listening import remove_socket_folder, socket_folder
from vfu_dev.errors import VfuDevError
from vfu_dev.socket_paths import default_control
from vfu_dev.vm.process import Child, until_listening
from vfu_dev.vm.servers import DeviceServer, ServerOptions

# Between two polls whether a server listens: how long it takes to start is a figure.
POLL_SECONDS = 0.001


# What is started in every case.
ARTIFACTS = ("libvfio-user", "bench-peer", "bench-client")


class BenchError(VfuDevError):
    """A measured server ended, or does not answer."""


@dataclass(frozen=True)
class Served:
    """One server process and its socket; ours alone listens on `control`, and on `port` if asked."""

    process: Child
    socket: Path
    control: Path
    port: int | None = None


class Bench:
    """Starts servers; `close` stops them and removes their files."""

    def __init__(self) -> None:
        self._library = artifact("libvfio-user", build=True)
        self._reference = artifact("bench-peer", build=True)
        self._folder = socket_folder("vfu-bench-")
        self._servers: list[Served] = []

    def _add(self, server: Served, starting: Iterator[float]) -> Served:
        self._servers.append(server)
        for pause in starting:
            time.sleep(min(pause, POLL_SECONDS))
        keep_server(server.process.pid)
        return server

    def ours(self, memory_mib: int, *options: str, fill: int = 1, metrics: bool = False) -> Served:
        """Start `vfu-dev serve`; `fill` 0 leaves the memory empty, as a destination's is.

        Args: metrics: with a metrics port.
        """
        extra, port = ["--log-level", "WARNING", *options], None
        if metrics:
            port = free_port()
            extra += ["--metrics-port", str(port)]
        given = ServerOptions(
            memory_bytes=memory_mib << 20, fill=fill, library=self._library, extra=tuple(extra)
        )
        server = DeviceServer(f"ours{len(self._servers)}", self._folder, self._folder, given)
        return self._add(Served(server.process, server.socket, server.control, port), server.starting())

    def reference(self, memory_mib: int, *, fill: int = 1) -> Served:
        """Start the peer."""
        name = f"c{len(self._servers)}"
        sock = self._folder / f"{name}.sock"
        argv = [str(self._reference), str(sock), str(memory_mib), *([str(fill)] if fill else [])]
        process = Child("the peer", argv, self._folder / f"{name}.log")
        process.start()
        return self._add(Served(process, sock, default_control(sock)), until_listening(process, sock))

    def file(self, name: str) -> Path:
        """Return the path of a file that is removed with the servers."""
        return self._folder / name

    def stop(self, server: Served) -> None:
        """Stop one server early."""
        self._servers.remove(server)
        server.process.end()

    def close(self) -> None:
        """Stop all servers and remove their files."""
        for server in self._servers:
            server.process.end()
        remove_socket_folder(self._folder)


@contextmanager
def bench() -> Iterator[Bench]:
    """Yield a `Bench`. Raises: BuildError: the library or the peer cannot be built."""
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
