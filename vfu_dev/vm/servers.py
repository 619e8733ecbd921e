"""Device servers: `vfu-dev serve` processes and their control sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfu_dev.errors import LabError
from vfu_dev.figures import Figures, Sample, Snapshot
from vfu_dev.vm.own_device import OwnDevice, package_environment
from vfu_dev.vm.process import PATIENCE_SECONDS, Child, wait_for_socket


@dataclass(frozen=True)
class ServerOptions:
    """What one `vfu-dev serve` is started with."""

    memory_bytes: int = 8 << 20
    page_size: int = 4096
    access: str = "trap"
    pre_copy: bool = True
    fill: int = 0
    library: Path | None = None
    faults: tuple[str, ...] = ()
    own: OwnDevice | None = None
    extra: tuple[str, ...] = ()

    def device_arguments(self) -> list[str]:
        """Return the arguments that say what is served; a class of one's own gets those that it takes."""
        values = {
            "memory": str(self.memory_bytes),
            "page-size": str(self.page_size),
            "access": self.access,
            "fill": str(self.fill),
        }
        argv = [] if self.own is None else ["--device", self.own.spec]
        for option, value in values.items():
            if self.own is None or option in self.own.takes:
                argv += [f"--{option}", value]
        return argv


class DeviceServer:
    """One served device: a process, its vfio-user socket and its control socket."""

    def __init__(self, name: str, sockets: Path, logs: Path, options: ServerOptions) -> None:
        self.name = name
        self.options = options
        self.socket = sockets / f"{name}.sock"
        self.control = sockets / f"{name}.ctl"
        argv = [sys.executable, "-m", "vfu_dev", "serve"]
        argv += ["--socket", str(self.socket)]
        argv += ["--control", str(self.control), "--name", name]
        argv += ["--pre-copy", "on" if options.pre_copy else "off"]
        argv += options.device_arguments()
        if options.library:
            argv += ["--library", str(options.library)]
        for fault in options.faults:
            argv += ["--fault", fault]
        argv += options.extra
        self.process = Child(f"server {name}", argv, logs / f"server-{name}.log", package_environment())
        self._sequence = 0  # of the last sample that `fetch_figures` returned

    async def start(self) -> None:
        """Start the process and wait until both sockets are there.

        Raises: ProcessError: it ended first. LabError: it is not ready in time.
        """
        await self.process.start()
        await wait_for_socket(self.socket, self.process)
        await wait_for_socket(self.control, self.process)

    async def command(self, name: str, **arguments: Any) -> Any:
        """Run one control command and return its result.

        Raises: LabError: the server refuses, is gone or does not answer.
        """
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                reader, writer = await asyncio.open_unix_connection(str(self.control), limit=1 << 24)
                try:
                    writer.write(json.dumps({"command": name, **arguments}).encode() + b"\n")
                    await writer.drain()
                    line = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            raise LabError(f"server {self.name}: control command {name!r}: {error or 'no answer'}") from error
        if not line:
            raise LabError(f"server {self.name}: control socket closed during {name!r}")
        reply = json.loads(line)
        if not reply.get("ok"):
            raise LabError(f"server {self.name}: {name}: {reply.get('error', 'refused')}")
        return reply.get("result")

    async def status(self) -> dict[str, Any]:
        """Return the server's status (the contract of the control socket)."""
        result: dict[str, Any] = await self.command("status")
        return result

    async def fetch_figures(self) -> tuple[Snapshot, list[Sample]]:
        """Return the server's figures, and the samples it took since this last returned any.

        This is how a running migration is fetched: the server neither looks at memory for it nor makes long
        answers.
        """
        sequence, more = self._sequence, True
        samples: list[Sample] = []
        while more:
            figures = Figures.from_dict(await self.command("figures", after=sequence))
            sequence, more = figures.sequence, figures.more
            samples += figures.samples
        self._sequence = sequence
        return figures.snapshot, samples

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
