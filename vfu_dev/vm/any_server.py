"""Any vfio-user server in the place of ours, started by a command of the user's."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vfu_dev.errors import ConfigError, LabError
from vfu_dev.figures import Sample, Snapshot
from vfu_dev.socket_paths import default_control
from vfu_dev.vm.process import STOP_SECONDS, Child, until_listening
from vfu_dev.vm.servers import ControlledServer

PLACEHOLDERS = ("{socket}", "{side}")
WITHOUT_CONTROL = (
    "the devices' digests, sizes and states are not in this report: "
    "a server of --server has no control socket"
)


def split_command(command: str) -> list[str]:
    """Return the words of a command. Raises: ConfigError: there are none, or none with {socket}."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--server {command!r}: {error}") from error
    if not any("{socket}" in word for word in words):
        raise ConfigError(f"--server {command!r}: needs {{socket}}, where the server is to listen")
    return words


class AnyServer(ControlledServer):
    """One server process that listens on a vfio-user socket, and that nothing else is known of.

    Args: command: its words; {socket} and {side} in them stand for the socket, and source or destination.
    """

    has_control = False

    def __init__(self, name: str, sockets: Path, logs: Path, command: list[str], side: str) -> None:
        self.socket = sockets / f"{name}.sock"
        super().__init__(name, default_control(self.socket))
        values = dict(zip(PLACEHOLDERS, (str(self.socket), side), strict=True))
        argv = []
        for word in command:
            for placeholder, value in values.items():
                word = word.replace(placeholder, value)
            argv.append(word)
        self.process = Child(f"server {name}", argv, logs / f"server-{name}.log")

    def starting(self) -> Iterator[float]:
        """Start it, and yield as `until_listening` does. Raises: ProcessError: it ended first. LabError."""
        self.process.start()
        yield from until_listening(self.process, self.socket)

    async def start(self) -> None:
        """Start it and wait until its socket accepts. Raises: as `starting`."""
        for pause in self.starting():
            await asyncio.sleep(pause)

    async def stop(self) -> int | None:
        """End it and whatever it has started: the whole process group."""
        if self.process.process is None:
            return None
        self._signal(signal.SIGTERM)
        with suppress(TimeoutError):
            await self.process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        return await self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self.process.pid, number)

    def remove_sockets(self) -> None:
        """Remove what a server that was killed left behind."""
        self.socket.unlink(missing_ok=True)

    async def command(self, name: str, **arguments: Any) -> Any:
        """Fail: it has no control socket."""
        raise LabError(f"server {self.name}: {name}: it has no control socket")

    async def fetch_figures(self) -> tuple[Snapshot, list[Sample]]:
        """Fail: it has no control socket."""
        raise LabError(f"server {self.name}: it has no control socket")
