"""Watching a migration between QEMUs that somebody else started, and making the report of one in the lab.

Needed are both QEMUs' monitors and both sides' control sockets; what is elsewhere is brought by `ssh -L`.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfu_dev import __version__
from vfu_dev.builds.qemu_binary import VFIO_PCI, VFIO_USER_PCI
from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS
from vfu_dev.errors import ConfigError, LabError
from vfu_dev.lab.clocks import align, compare_clocks
from vfu_dev.lab.host import Fetched, fetch_all
from vfu_dev.lab.judge import judge
from vfu_dev.lab.observer import MoveReporter, ObservedMove, TimeLimitError
from vfu_dev.lab.pausing import PAUSED
from vfu_dev.lab.result import FINAL_STATES, MigrationResult, QemuSide
from vfu_dev.socket_paths import control_path
from vfu_dev.vm.monitor import Monitor, QmpError
from vfu_dev.vm.servers import ControlledServer


@dataclass(frozen=True)
class WatchOptions:
    """What is watched.

    Attributes:
        qmp_source, qmp_destination: sockets of QEMUs' monitors, which nobody else uses meanwhile.
        control_source, control_destination: control sockets of the devices' servers, or the devices' own, in
            one order on both sides.
        migrate: begin it, to this address; None: wait for somebody to do so.
        timeout_seconds: how long it may take, and be waited for.
    """

    qmp_source: Path
    qmp_destination: Path
    control_source: tuple[Path, ...]
    control_destination: tuple[Path, ...]
    migrate: str | None = None
    timeout_seconds: float = 180.0

    def __post_init__(self) -> None:
        if len(self.control_source) != len(self.control_destination):
            raise ConfigError(
                f"{len(self.control_source)} devices at the source, {len(self.control_destination)} at the "
                "destination: name the control socket of each, on both sides"
            )


class WatchedHost:
    """One side: a monitor, and its devices' servers."""

    def __init__(self, name: str, qmp: Path, controls: Sequence[Path]) -> None:
        self.qemu = Monitor(name, qmp)
        self.servers = [
            ControlledServer(f"{name}-vfu{index}", control_path(path)) for index, path in enumerate(controls)
        ]

    async def open(self) -> QemuSide:
        """Connect, and return which QEMU it is. Raises: LabError: it cannot be watched; says what to do."""
        if not self.qemu.qmp_socket.is_socket():
            raise LabError(
                f"{self.qemu.qmp_socket}: no such socket; QEMU makes one with "
                "-qmp unix:PATH,server=on,wait=off"
            )
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                await self.qemu.connect()
        except TimeoutError as error:
            raise LabError(
                f"{self.qemu.qmp_socket}: no greeting in {GREETING_SECONDS:g} s; a monitor has one client at "
                "a time: give QEMU a second -qmp for this"
            ) from error
        for server in self.servers:
            await server.status()
        version = (await self.qemu.execute("query-version"))["qemu"]
        return QemuSide("{major}.{minor}.{micro}".format(**version), await self._front_end())

    async def _front_end(self) -> str | None:
        """Return what attaches the devices, as far as QEMU's tree of objects says."""
        for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
            for child in await self.qemu.execute("qom-list", path=folder):
                if (name := child["type"].removeprefix("child<").rstrip(">")) in (VFIO_USER_PCI, VFIO_PCI):
                    return str(name)
        return None

    async def fetch_figures(self) -> list[Fetched]:
        """Return what each server measured."""
        return await fetch_all(self.servers)

    async def close(self) -> None:
        """Hang up."""
        await self.qemu.disconnect()


# A QEMU that runs greets at once, unless another client holds its monitor.
GREETING_SECONDS = 20.0


class Watcher(ObservedMove):
    """Observes two QEMUs that it did not start."""

    source: WatchedHost
    destination: WatchedHost

    def __init__(self, options: WatchOptions, reporter: MoveReporter | None = None) -> None:
        super().__init__(len(options.control_source), reporter)
        self.timeout_seconds = options.timeout_seconds
        self.source = WatchedHost("source", options.qmp_source, options.control_source)
        self.destination = WatchedHost("destination", options.qmp_destination, options.control_destination)
        self._parameters: dict[str, Any] = {}
        self._changes = -1

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The source's, as they were when last asked for."""
        return self._parameters

    @property
    def downtime_limit_ms(self) -> int:
        """The source's."""
        return int(self._parameters.get("downtime_limit", DOWNTIME_LIMIT_SECONDS * 1000))

    async def sample(self) -> dict[str, Any]:
        """Ask both sides. Of a source that its owner ended the events say how the migration did."""
        try:
            found = await self.in_time(self.source.qemu.execute("query-migrate-parameters"))
            self._parameters = {key.replace("-", "_"): value for key, value in found.items()}
            return await super().sample()
        except QmpError:
            if (status := self._told()) not in FINAL_STATES:
                raise
            row = {**self.samples[-1], "time": time.time(), "status": status}
            self.samples.append(row)
            return row

    def _told(self) -> str | None:
        """Return the last status from the source's events."""
        told = [one["data"]["status"] for one in self.source.qemu.events if one["event"] == "MIGRATION"]
        return str(told[-1]) if told else None

    def began(self, row: Mapping[str, Any]) -> bool:
        """Return whether a migration began since the first time that this was asked."""
        changes = sum(count for one in self.snapshots if one is not None for _, _, count in one.transitions)
        before, self._changes = self._changes, changes if self._changes < 0 else self._changes
        return row["status"] not in ("none", *FINAL_STATES) or (before >= 0 and changes != before)

    async def begin(self, uri: str) -> None:
        """Have the destination listen, unless it does, and the source migrate. Raises: QmpError: refused."""
        capabilities = [{"capability": name, "state": True} for name in ("events", "return-path")]
        for qemu in (self.destination.qemu, self.source.qemu):
            with contextlib.suppress(QmpError):  # a destination that listens already takes none any more
                await qemu.execute("migrate-set-capabilities", capabilities=capabilities)
        try:
            await self.destination.qemu.execute("migrate-incoming", uri=uri)
        except QmpError as error:
            if "already" not in error.reason:
                raise
        await self.source.qemu.execute("migrate", uri=uri)


async def watch(
    options: WatchOptions, command: list[str], reporter: MoveReporter | None = None
) -> MigrationResult:
    """Watch one migration and return what came of it; what goes wrong is in it, not raised.

    Raises: LabError: there is nothing to watch.
    """
    result = MigrationResult(started=time.time(), command=command)
    watcher = Watcher(options, reporter)
    try:
        sides = [await host.open() for host in (watcher.source, watcher.destination)]
        result.qemu.read_sides(*sides)
        result.versions = {"vfu-dev": __version__, "python": platform.python_version()}
        result.versions["qemu"] = result.qemu.version or f"{sides[0].version} to {sides[1].version}"
        try:
            await _watch(watcher, options, result)
        except LabError as error:
            result.problems.append(str(error))
        result.qemu.parameters = dict(watcher.parameters)
        result.qemu.downtime_limit_ms = watcher.downtime_limit_ms
        await watcher.collect(result)
    finally:
        await watcher.source.close()
        await watcher.destination.close()
    if result.qemu.status == "none" and (told := watcher.samples[-1:]):
        # The source's owner has ended it, and with it QEMU's own figures.
        result.qemu.status = told[0]["status"]
    if (clocks := compare_clocks(result)) is not None:
        result.clocks = clocks.to_json()
        if clocks.differ:
            align(result, clocks)
    result.ended = time.time()
    judge(result, None, verified=False, cancelled=watcher.cancelled)
    return result


async def _watch(watcher: Watcher, options: WatchOptions, result: MigrationResult) -> None:
    await watcher.forget()
    if options.migrate is not None:
        await watcher.begin(options.migrate)
        watcher.reporter("phase", {"text": "migrating"})
    else:
        watcher.reporter("phase", {"text": "waiting for a migration to begin"})
        await watcher.wait_for(watcher.began, "a migration that begins")
        watcher.reporter("phase", {"text": "a migration has begun"})
    result.started = watcher.samples[0]["time"] if watcher.samples else result.started
    # A pause before the switchover has to be ended by the side that began the migration.
    ends = FINAL_STATES if options.migrate is None else (*FINAL_STATES, PAUSED)
    try:
        row = await watcher.wait_for(lambda row: row["status"] in ends, "end of the migration")
        if row["status"] == PAUSED:
            await watcher.source.qemu.execute("migrate-continue", state=PAUSED)
            await watcher.wait_final()
            row = watcher.samples[-1]
    except TimeLimitError as error:
        if options.migrate is None:
            raise
        result.problems.append(str(error))
        await watcher.cancel()
        return
    if row["status"] == "completed":
        result.moved = True
        # The migration's owner may start the VM later by itself: libvirt does.
        await watcher.wait_running(watcher.destination.qemu)
