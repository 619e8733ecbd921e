"""A destination on another machine, reached by ssh alone: its processes there, its sockets here.

`vfu-dev lab host` runs on the far side (see `far`), and `ssh -L` brings its monitor, control sockets and
serial line. Commands go over ssh, the migration itself from QEMU to QEMU by TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vfu_dev import JSON_VERSION
from vfu_dev.builds.qemu_binary import newest_common, probe_qemu
from vfu_dev.client.listening import remove_socket_folder, socket_folder
from vfu_dev.errors import ConfigError, LabError, shown
from vfu_dev.lab.far import ALIVE_SECONDS, SILENCE_SECONDS, settings_of
from vfu_dev.lab.host import Host
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import QemuSide
from vfu_dev.lab.route import Route
from vfu_dev.vm.monitor import Monitor
from vfu_dev.vm.process import PATIENCE_SECONDS, STOP_SECONDS, Child, ProcessError, wait_for_socket
from vfu_dev.vm.qemu import Qemu
from vfu_dev.vm.servers import ControlledServer, DeviceServer
from vfu_dev.vm.trace import TraceEvent, parse_trace

# What starts ssh, with options; as GIT_SSH_COMMAND is for git.
SSH_VARIABLE = "VFU_DEV_SSH"
# Nobody can type a password; a dead connection ends, and with it the far side.
_OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")


@dataclass(frozen=True)
class Destination:
    """Another machine.

    Attributes:
        host: as ssh takes it: a name, `user@name`, an alias of its configuration.
        port: of its sshd, None for ssh's own.
        program: vfu-dev there.
        qemu: its QEMU as that machine names it: a path or one of the names of `--qemu`; None: the default.
    """

    host: str
    port: int | None = None
    program: str = "vfu-dev"
    qemu: str | None = None
    front_end: str | None = None
    iommu: str | None = None

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Return what `ssh://[USER@]HOST[:PORT][/PATH/OF/vfu-dev]` names. Raises: ConfigError."""
        try:
            url = urlsplit(text)
            host, port = url.netloc.rpartition("@")[2], url.port
        except ValueError as error:
            raise ConfigError(f"{shown(text)}: {error}") from error
        if url.scheme != "ssh" or not host or url.query or url.fragment or url.netloc.startswith("-"):
            raise ConfigError(f"{shown(text)}: expected ssh://[USER@]HOST[:PORT][/PATH/OF/vfu-dev]")
        user = f"{url.username}@" if url.username else ""
        return cls(f"{user}{url.hostname}", port, url.path if url.path.strip("/") else "vfu-dev")

    def ssh(self, *options: str) -> list[str]:
        """Return the beginning of an ssh command line, up to the host."""
        port = ["-p", str(self.port)] if self.port else []
        return [
            *shlex.split(os.environ.get(SSH_VARIABLE, "ssh")),
            *_OPTIONS,
            *port,
            *options,
            "--",
            self.host,
        ]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there. Raises: LabError: ssh does not get there; with its own words."""
        try:
            done = subprocess.run(
                [*self.ssh(), shlex.join(command)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LabError(f"ssh {self.host}: {error}") from error
        if done.returncode == 255:  # ssh's own
            raise LabError(f"ssh {self.host}: {done.stderr.strip() or 'no connection'}")
        return done

    @property
    def address(self) -> str:
        """The name or address that ssh connects to, by its configuration."""
        argv = self.ssh("-G")
        said = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        found = re.search(r"^hostname (\S+)$", said.stdout, re.MULTILINE)
        return found[1] if found else self.host.rpartition("@")[2]


def require_far_side(destination: Destination, guest: bool) -> dict[str, Any]:
    """Run `doctor` there for the parts that a move needs, and return its findings.

    Raises: LabError: something is missing; says what, and what to do there.
    """
    done = destination.run(destination.program, "doctor", "--json=-")
    try:
        found: dict[str, Any] = json.loads(done.stdout)
        facts = {
            "libvfio-user": found["library"]["path"],
            "a QEMU": any(one["version"] for one in found["qemu"]),
            "the guest": found["guest"]["path"] or not guest,
        }
    except (ValueError, KeyError, TypeError) as error:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise LabError(
            f"{destination.host}: no vfu-dev answers there ({said}); install it, in the PATH of a shell that "
            f"ssh starts, or name it: ssh://{destination.host}/path/to/vfu-dev"
        ) from error
    if missing := [name for name, there in facts.items() if not there]:
        advice = "; ".join(f"{one['what']}: {one['fix']}" for one in found["problems"])
        raise LabError(f"{destination.host} has not {' and not '.join(missing)}: {advice}")
    return found


class Connection(Child):
    """`vfu-dev lab host` on the far side, by ssh; it ends with its input, and so with us."""

    def __init__(self, name: str, argv: Sequence[str], log: Path) -> None:
        super().__init__(name, argv, log)
        self._sending, self._over = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Start ssh. Raises: ProcessError: there is none."""
        with self.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise ProcessError(self.name, None, self.log, f"cannot be started: {error}") from error
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def _keep_alive(self) -> None:
        """Send empty lines; a thread, because the far side would take a busy event loop for a cut network."""
        while not self._over.wait(ALIVE_SECONDS):
            with contextlib.suppress(OSError, ValueError):  # it ended, or its input was closed
                self._send(b"\n")

    def _send(self, line: bytes) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        with self._sending:
            self.process.stdin.write(line)
            self.process.stdin.flush()

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send an object and return the answer. Raises: LabError: the far side refuses, in words, or ends."""
        assert self.process is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._send(json.dumps(request).encode() + b"\n")
        line = await asyncio.to_thread(self.process.stdout.readline)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            await self.wait(STOP_SECONDS)
            raise ProcessError(self.name, self.status, self.log, "ended") from error
        if "error" in answer:
            raise LabError(f"{self.name}: {answer['error']}")
        return answer

    async def stop(self, first: signal.Signals = signal.SIGTERM) -> int | None:
        """Have the far side end what it started, by the end of its input; insist in the end."""
        self._over.set()
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            with contextlib.suppress(TimeoutError):
                return await self.wait(STOP_SECONDS)
        return await super().stop(first)


class _FarServer(DeviceServer):
    """A server there; `process` is the connection."""

    def __init__(self, name: str, control: Path, process: Child) -> None:
        ControlledServer.__init__(self, name, control)
        self.process = process


class _FarQemu(Qemu):
    """A QEMU there, by its forwarded sockets; `process` is the connection."""

    def __init__(self, host: FarHost) -> None:
        Monitor.__init__(self, host.name, host.folder / "far.qmp")
        self.line_socket, self.qtest_socket = host.folder / "far.line", host.folder / "far.qtest"
        self.console_log = host.logs / "far.log"
        self.process = host.connection
        self._host = host

    async def _end_of(self, error: Exception) -> None:
        """Wait for nothing: the connection does not end with its QEMU."""

    @property
    def command_line(self) -> list[str]:
        """How it was started there."""
        return list(self._host.found.get("command_line", ()))

    def trace(self) -> list[TraceEvent]:
        """Fetch the trace that it wrote there."""
        log = self._host.logs / "destination-trace.log"
        if "trace" in self._host.found:
            with contextlib.suppress(LabError):
                log.write_text(self._host.far.run("cat", self._host.found["trace"]).stdout)
        return parse_trace(log)


class FarHost(Host):
    """The destination's host, on another machine. `open` comes first, then what `Host` has."""

    def __init__(self, far: Destination, logs: Path, options: MigrateOptions) -> None:
        self.name = "destination"
        self.far, self.logs = far, logs
        self.folder = socket_folder("vfud-near-")
        self.found: dict[str, Any] = {}
        self.machine = "q35"
        self._options = options
        self._side = QemuSide()
        argv = [*far.ssh("-T"), shlex.join([far.program, "lab", "host"])]
        self.connection = Connection(f"ssh {far.host}", argv, logs / "far.log")
        self._forwards: Child | None = None
        self.servers = [
            _FarServer(f"destination-vfu{index}", self.folder / f"far-vfu{index}.ctl", self.connection)
            for index in range(options.devices)
        ]
        self.qemu = _FarQemu(self)

    async def open(self) -> str:
        """Query the far side, and return the machine type that both QEMUs have.

        Raises: LabError: something is missing there, or the QEMUs have no machine in common.
        """
        far = self.far
        require_far_side(far, self._options.guest_image is not None)
        self.connection.start()
        wanted = {"qemu": far.qemu, "front_end": far.front_end, "iommu": far.iommu}
        found = await self.connection.ask({**wanted, "silence_seconds": SILENCE_SECONDS})
        if found["json_version"] != JSON_VERSION:
            raise LabError(
                f"{far.host} has vfu-dev {found['vfu_dev']}, a different version; install this one"
            )
        self._side = QemuSide(found["version"], found["front_end"], found["iommu"])
        near = probe_qemu(self._options.qemu_source.binary)
        there = [tuple(version) for version in found["machines"]]
        self.machine = newest_common(near, found["version"], there)
        return self.machine

    def require_migration(self) -> None:
        """Do nothing: the far side has said that its QEMU migrates the devices."""

    def describe(self) -> QemuSide:
        """Return which QEMU it has."""
        return self._side

    async def start(self) -> None:
        """Start servers and QEMU there, and bring their sockets here. Raises: LabError."""
        found = self.found = await self.connection.ask(settings_of(self._options, self.machine))
        pairs = {
            self.qemu.qmp_socket: found["qmp"],
            self.qemu.line_socket: found["line"],
            self.qemu.qtest_socket: found["qtest"],
            **{server.control: there for server, there in zip(self.servers, found["controls"], strict=True)},
        }
        options = ["-N", "-o", "ExitOnForwardFailure=yes"]
        for near, there in pairs.items():
            options += ["-L", f"{near}:{there}"]
        log = self.logs / "far-sockets.log"
        self._forwards = Child(f"ssh -L {self.far.host}", self.far.ssh(*options), log)
        self._forwards.start()
        for socket in pairs:
            await wait_for_socket(socket, self._forwards)
        await self.qemu.connect()

    async def stop(self) -> None:
        """End all of it there, and hang up."""
        await self.qemu.disconnect()
        await self.connection.stop()
        if self._forwards is not None:
            await self._forwards.stop()
        remove_socket_folder(self.folder)


class FarRoute(Route):
    """TCP to another machine, to a port that its QEMU chooses."""

    def __init__(self, far: Destination) -> None:
        self._far = far

    async def listen(self, destination: Qemu) -> str:
        """Listen on all of its addresses, and return that which ssh takes."""
        await destination.execute("migrate-incoming", uri="tcp:0.0.0.0:0")
        (listening,) = (await destination.migration())["socket-address"]
        address = self._far.address
        return f"tcp:{f'[{address}]' if ':' in address else address}:{listening['port']}"
