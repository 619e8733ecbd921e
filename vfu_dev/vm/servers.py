"""Device servers: `vfu-dev serve` processes and their control sockets. The one way to start them.

`DeviceServer` is for asyncio; `served` is for those who do without.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfu_dev.client.control import ControlClient, ControlError
from vfu_dev.client.listening import remove_socket_folder, socket_folder
from vfu_dev.errors import LabError, ProtocolError
from vfu_dev.figures import Figures, Sample, Snapshot
from vfu_dev.socket_paths import default_control
from vfu_dev.vm.own_device import OwnDevice, package_environment
from vfu_dev.vm.process import PATIENCE_SECONDS, Child, ProcessError, last_lines, until_listening


@dataclass(frozen=True)
class ServerOptions:
    """What one `vfu-dev serve` is started with; for None the server's own default holds."""

    memory_bytes: int | None = None
    page_size: int | None = None
    access: str | None = None
    pre_copy: bool | None = None
    fill: int | None = None
    library: Path | None = None
    faults: tuple[str, ...] = ()
    own: OwnDevice | None = None
    extra: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return the arguments of `serve`; a class of one's own gets those of the device's that it takes."""
        values = {
            "memory": self.memory_bytes,
            "page-size": self.page_size,
            "access": self.access,
            "fill": self.fill,
        }
        argv = [] if self.own is None else ["--device", self.own.spec]
        for option, value in values.items():
            if value is not None and (self.own is None or option in self.own.takes):
                argv += [f"--{option}", str(value)]
        if self.pre_copy is not None:
            argv += ["--pre-copy", "on" if self.pre_copy else "off"]
        if self.library is not None:
            argv += ["--library", str(self.library)]
        for fault in self.faults:
            argv += ["--fault", fault]
        return [*argv, *self.extra]


class ControlledServer:
    """A server that somebody started, by its control socket.

    Attributes: has_control: there is one; without, every command fails.
    """

    has_control = True

    def __init__(self, name: str, control: Path) -> None:
        self.name = name
        self.control = control
        self._sequence = 0  # of the last sample that `fetch_figures` returned

    def open_control(self) -> ControlClient:
        """Connect to the control socket. Raises: ControlError: nobody listens there."""
        return ControlClient(self.control, timeout_seconds=PATIENCE_SECONDS)

    async def command(self, name: str, **arguments: Any) -> Any:
        """Run one control command and return its result.

        Raises: LabError: the server refuses, is gone or does not answer.
        """

        def ask() -> Any:
            with self.open_control() as control:
                return control.command(name, **arguments)

        try:
            return await asyncio.to_thread(ask)
        except (ControlError, ProtocolError) as error:
            raise LabError(f"server {self.name}: {error}") from error

    async def status(self) -> dict[str, Any]:
        """Return the server's status (the contract of the control socket)."""
        result: dict[str, Any] = await self.command("status")
        return result

    async def fetch_figures(self) -> tuple[Snapshot, list[Sample]]:
        """Return the server's figures, and the samples it took since this last returned any.

        A running migration is sampled this way: the server reads no memory for it, and its answers are short.
        """
        sequence, more = self._sequence, True
        samples: list[Sample] = []
        while more:
            figures = Figures.from_dict(await self.command("figures", after=sequence))
            sequence, more = figures.sequence, figures.more
            samples += figures.samples
        self._sequence = sequence
        return figures.snapshot, samples


class DeviceServer(ControlledServer):
    """One served device: a process, its vfio-user socket and its control socket."""

    def __init__(self, name: str, sockets: Path, logs: Path, options: ServerOptions) -> None:
        self.socket = sockets / f"{name}.sock"
        super().__init__(name, default_control(self.socket))
        self.options = options
        argv = [sys.executable, "-m", "vfu_dev", "serve", "--name", name]
        argv += ["--socket", str(self.socket), "--control", str(self.control), *options.arguments()]
        self.process = Child(f"server {name}", argv, logs / f"server-{name}.log", package_environment())

    def starting(self) -> Iterator[float]:
        """Start the process, and yield as `until_listening` does until both sockets are there.

        Raises: ProcessError: it ended first. LabError: it is not ready in time.
        """
        self.process.start()
        yield from until_listening(self.process, self.socket, self.control)

    async def start(self) -> None:
        """Start the process and wait until both sockets are there. Raises: as `starting`."""
        for pause in self.starting():
            await asyncio.sleep(pause)

    async def stop(self) -> int | None:
        """End the server with SIGTERM and return its exit status."""
        return await self.process.stop(signal.SIGTERM)

    def remove_sockets(self) -> None:
        """Remove what a server that was killed left behind."""
        self.socket.unlink(missing_ok=True)
        self.control.unlink(missing_ok=True)

    async def kill(self) -> None:
        """Kill the server at once, as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@contextmanager
def served(
    servers: Sequence[tuple[str, ServerOptions]], pause: Callable[[float], object] = time.sleep
) -> Iterator[list[DeviceServer]]:
    """Serve each (name, options), in a folder of their own that is removed at the end.

    Args: pause: waits for the given seconds while a server comes up; an exception ends the wait.
    Raises: LabError: one does not come up; its own message is in the text.
    """
    with ExitStack() as stack:
        folder = socket_folder("vfu-served-")
        stack.callback(remove_socket_folder, folder)
        started = []
        for name, options in servers:
            server = DeviceServer(name, folder, folder, options)
            stack.callback(server.process.end)
            try:
                for seconds in server.starting():
                    pause(seconds)
            except ProcessError as error:  # whose log goes with the folder
                said = last_lines(error.log, 3)
                raise LabError(f"server {name} does not come up: {said}") from error
            started.append(server)
        yield started
