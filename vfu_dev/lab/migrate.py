"""The experiment: devices under load on one QEMU, live-migrated to another, everything checked.

`Lab` owns the processes of one run: a server for each device on either side, two QEMUs, a guest. Tests use
its steps one by one; `run()` is the whole of `vfu-dev lab migrate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vfu_dev import __version__
from vfu_dev.errors import LabError
from vfu_dev.figures import Sample, Snapshot
from vfu_dev.lab.convergence import Convergence, assess, threshold_bytes
from vfu_dev.lab.guest import Guest, LinuxGuest, LoadPlan
from vfu_dev.lab.judge import judge
from vfu_dev.lab.process import ProcessError
from vfu_dev.lab.qemu import Qemu, QemuOptions, QmpError, qemu_features
from vfu_dev.lab.qtest_guest import QtestGuest
from vfu_dev.lab.result import DeviceResult, MigrationResult
from vfu_dev.lab.servers import DeviceServer, ServerOptions
from vfu_dev.lab.trace import states_set

# QEMU migrates a Linux guest's own RAM too; a qtest machine needs next to none.
LINUX_RAM_BYTES = 192 << 20
QTEST_RAM_BYTES = 32 << 20
# How often both sides are asked while a migration runs. QEMU itself decides every 100 ms.
SAMPLE_SECONDS = 0.05
# Samples grow fewer as a migration grows longer: about this many for each factor of e in time.
SAMPLES_KEPT = 400
# How long a cancelled migration may take to end.
GIVE_UP_SECONDS = 10.0
FINAL_STATES = ("completed", "failed", "cancelled")
# Added to the source's initial content, so that a destination that received nothing cannot match it.
SOURCE_FILL = 0x5646_5544

Observer = Callable[[str, dict[str, Any]], None]


class TimeLimitError(LabError):
    """What was waited for did not come in time."""


@dataclass(frozen=True)
class MigrateOptions:
    """One experiment. Sizes in bytes, rates in bytes a second, times in milliseconds."""

    qemu: Path
    guest_image: Path | None = None  # None: --guest none
    library: Path | None = None
    memory_bytes: int = 8 << 20
    devices: int = 1
    load: LoadPlan = field(default_factory=LoadPlan)
    pre_copy: bool = True
    switchover_ack: bool = False
    downtime_limit_ms: int = 300
    max_bandwidth: int = 32 << 20
    switchover_bandwidth: int = 0  # 0: QEMU estimates it
    accel: str = "tcg"
    warmup_seconds: float = 1.0
    settle_seconds: float = 1.0
    timeout_seconds: float = 180.0
    fill: int = SOURCE_FILL
    server_extra: tuple[str, ...] = ()

    @property
    def ram_bytes(self) -> int:
        """Guest RAM: the journals of all devices must fit beside the system."""
        if self.guest_image is None:
            return QTEST_RAM_BYTES
        return LINUX_RAM_BYTES + self.devices * (-(-self.memory_bytes // (1 << 20)) << 20)


class Side:
    """One host of the migration: device servers and the QEMU attached to them."""

    def __init__(self, name: str, sockets: Path, logs: Path, options: MigrateOptions, incoming: bool) -> None:
        self.name = name
        server = ServerOptions(
            memory_bytes=options.memory_bytes,
            pre_copy=options.pre_copy,
            fill=0 if incoming else options.fill,
            library=options.library,
            extra=options.server_extra,
        )
        self.servers = [DeviceServer(f"{name}-vfu{i}", sockets, logs, server) for i in range(options.devices)]
        machine = QemuOptions(
            binary=options.qemu,
            ram_bytes=options.ram_bytes,
            accel=options.accel,
            guest=options.guest_image,
            incoming=incoming,
        )
        self.qemu = Qemu(name, sockets, logs, machine, [server.socket for server in self.servers])

    async def start(self) -> None:
        """Start the servers, then QEMU. Raises: ProcessError, LabError."""
        await asyncio.gather(*(server.start() for server in self.servers))
        await self.qemu.start()

    async def stop(self) -> None:
        """Stop QEMU, then the servers."""
        await self.qemu.stop()
        await asyncio.gather(*(server.stop() for server in self.servers))


class Lab:
    """The processes of one experiment; an async context manager that leaves nothing behind.

    `logs` is kept; sockets live in a short temporary path, because UNIX socket names end at 107 bytes.
    """

    def __init__(self, options: MigrateOptions, logs: Path, observer: Observer | None = None) -> None:
        self.options = options
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        for old in logs.glob("*.log"):
            old.unlink()
        self.sockets = Path(tempfile.mkdtemp(prefix="vfud-lab-"))
        self.source = Side("source", self.sockets, logs, options, incoming=False)
        self.destination = Side("destination", self.sockets, logs, options, incoming=True)
        self.guest: Guest = QtestGuest() if options.guest_image is None else LinuxGuest()
        self.samples: list[dict[str, Any]] = []
        self.convergence: Convergence | None = None
        # Of each of the source's servers: its figures, and all samples so far.
        self.snapshots: list[Snapshot | None] = [None] * options.devices
        self.server_samples: list[list[Sample]] = [[] for _ in range(options.devices)]
        self._sequences = [0] * options.devices
        self.observe: Observer = observer or (lambda what, data: None)

    async def __aenter__(self) -> Lab:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop everything, whatever state it is in."""
        with contextlib.suppress(LabError, OSError):
            await self.guest.close()
        await asyncio.gather(self.source.stop(), self.destination.stop())
        shutil.rmtree(self.sockets, ignore_errors=True)

    async def start(self) -> None:
        """Start both sides, wait for the guest, start the load. Raises: LabError."""
        self.observe("phase", {"text": "starting servers and QEMU"})
        await self.source.start()
        await self.destination.start()
        self.observe("phase", {"text": "waiting for the guest"})
        await self.guest.ready(self.source.qemu)
        self.observe("phase", {"text": "guest is up; load starts"})
        await self.guest.start(self.options.load)
        await asyncio.sleep(self.options.warmup_seconds)

    async def configure(self, *qemus: Qemu, return_path: bool = True) -> None:
        """Set migration capabilities and parameters on `qemus`; both sides when none is named.

        With a return path the source waits for the destination's word. Without, as a file needs it, the
        source completes when everything is sent, whether or not it is accepted.
        """
        options = self.options
        capabilities = [
            {"capability": "events", "state": True},
            {"capability": "return-path", "state": return_path},
        ]
        if options.switchover_ack:
            capabilities.append({"capability": "switchover-ack", "state": True})
        for qemu in qemus or (self.source.qemu, self.destination.qemu):
            await qemu.execute("migrate-set-capabilities", capabilities=capabilities)
            await qemu.execute("migrate-set-parameters", **self.parameters())

    def parameters(self) -> dict[str, Any]:
        """Return the migration parameters that this experiment sets."""
        parameters: dict[str, Any] = {
            "downtime_limit": self.options.downtime_limit_ms,
            "max_bandwidth": self.options.max_bandwidth,
        }
        if self.options.switchover_bandwidth:
            parameters["avail_switchover_bandwidth"] = self.options.switchover_bandwidth
        return parameters

    async def listen(self) -> str:
        """Make the destination listen and return the address to migrate to."""
        path = self.sockets / "migration.sock"
        path.unlink(missing_ok=True)
        await self.destination.qemu.execute("migrate-incoming", uri=f"unix:{path}")
        return f"unix:{path}"

    async def replace_destination(self, options: MigrateOptions | None = None) -> None:
        """Stop the destination and start a fresh one (QEMU cannot receive twice)."""
        await self.destination.stop()
        self.destination = Side(
            "destination", self.sockets, self.logs, options or self.options, incoming=True
        )
        await self.destination.start()

    async def begin(self, uri: str) -> None:
        """Start the outgoing migration. Raises: QmpError: refused (a blocker, say)."""
        await self.source.qemu.execute("migrate", uri=uri)

    async def sample(self) -> dict[str, Any]:
        """Ask QEMU and all servers where they are, and keep the answer."""
        now = time.time()
        migration = await self.source.qemu.migration()
        row: dict[str, Any] = {"time": now, "status": migration.get("status", "none"), "qemu": migration}
        for side in (self.source, self.destination):
            answers = await asyncio.gather(*(s.status() for s in side.servers), return_exceptions=True)
            row[side.name] = [_brief(answer) for answer in answers]
        row["threshold_bytes"] = threshold_bytes(
            self.parameters(), self.options.downtime_limit_ms, row["qemu"]
        )
        self.samples.append(row)
        await self._assess(row)
        self.observe("sample", row)
        return row

    async def watch(self) -> None:
        """Fetch what the source's servers measured since the last time; one that is gone stays as it was."""
        for index, server in enumerate(self.source.servers):
            with contextlib.suppress(LabError):
                more = True
                while more:
                    figures = await server.figures(self._sequences[index])
                    self.snapshots[index], more = figures.snapshot, figures.more
                    self._sequences[index] = figures.sequence
                    self.server_samples[index] += figures.samples

    async def _assess(self, row: dict[str, Any]) -> None:
        await self.watch()
        devices = [snapshot for snapshot in self.snapshots if snapshot is not None]
        if len(devices) == len(self.snapshots) and all("PRE_COPY" in device.state for device in devices):
            self.convergence = assess(
                [device.forecast for device in devices], row["qemu"], row["threshold_bytes"]
            )
            self.observe("convergence", self.convergence.to_json())

    async def wait_for(
        self, condition: Callable[[dict[str, Any]], bool], what: str, timeout_seconds: float | None = None
    ) -> dict[str, Any]:
        """Sample until `condition(row)` holds and return that row.

        Raises: TimeLimitError: not within the time. LabError: the source's QEMU ended.
        """
        limit = timeout_seconds if timeout_seconds is not None else self.options.timeout_seconds
        began = time.monotonic()
        deadline = began + limit
        while True:
            row = await self.sample()
            if condition(row):
                return row
            if time.monotonic() > deadline:
                raise TimeLimitError(f"{what}: not within {limit:g} s; migration is {row['status']!r}")
            pause = max(SAMPLE_SECONDS, (time.monotonic() - began) / SAMPLES_KEPT)
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))

    async def wait_final(self, timeout_seconds: float | None = None) -> dict[str, Any]:
        """Wait until the migration ends in any way and return `query-migrate`."""
        row = await self.wait_for(
            lambda r: r["status"] in FINAL_STATES, "end of the migration", timeout_seconds
        )
        reply: dict[str, Any] = row["qemu"]
        return reply

    async def wait_running(self, qemu: Qemu, timeout_seconds: float = 20.0) -> None:
        """Wait until the VM of `qemu` runs. Raises: LabError, ProcessError."""
        deadline = time.monotonic() + timeout_seconds
        while (state := await qemu.run_state()) != "running":
            if time.monotonic() > deadline:
                raise LabError(f"{qemu.name}: the VM is {state!r}, not running, after {timeout_seconds:g} s")
            await asyncio.sleep(0.01)

    async def migrate(self) -> dict[str, Any]:
        """Configure, listen, migrate and wait for the end; return the last `query-migrate`."""
        await self.configure()
        uri = await self.listen()
        self.observe("phase", {"text": "migrating"})
        await self.begin(uri)
        return await self.wait_final()

    async def give_up(self) -> None:
        """Cancel the migration, so that the VM goes on at the source. Raises: LabError."""
        self.observe("phase", {"text": "giving up: cancelling the migration"})
        await self.source.qemu.execute("migrate_cancel")
        await self.wait_final(GIVE_UP_SECONDS)

    async def collect(self, result: MigrationResult) -> None:
        """Take what servers, QEMUs and traces say into `result`; parts that are gone stay empty."""
        await self.watch()
        for index, (source, destination) in enumerate(
            zip(self.source.servers, self.destination.servers, strict=True)
        ):
            device = DeviceResult(name=f"vfu{index}")
            for server, read in ((source, device.read_source), (destination, device.read_destination)):
                try:
                    read(await server.status())
                except LabError as error:
                    result.problems.append(str(error))
            device.read_figures(self.snapshots[index], self.server_samples[index])
            result.devices.append(device)
        if self.convergence is not None:
            result.convergence = self.convergence.to_json()
        out, source_qemu, destination_qemu = result.qemu, self.source.qemu, self.destination.qemu
        with contextlib.suppress(LabError):
            active = [row["qemu"] for row in self.samples if row["status"] not in FINAL_STATES]
            out.read_migration(await source_qemu.migration(), active[-1] if active else {})
            out.run_state_source = await source_qemu.run_state()
            out.capabilities = [
                entry["capability"]
                for entry in await source_qemu.execute("query-migrate-capabilities")
                if entry["state"]
            ]
        with contextlib.suppress(LabError):
            out.run_state_destination = await destination_qemu.run_state()
        out.command_line_source = source_qemu.process.argv
        out.command_line_destination = destination_qemu.process.argv
        out.events_source, out.events_destination = source_qemu.events, destination_qemu.events
        source_trace, destination_trace = source_qemu.trace(), destination_qemu.trace()
        out.trace_source = [event.to_json() for event in source_trace]
        out.trace_destination = [event.to_json() for event in destination_trace]
        out.states_source = states_set(source_trace)
        out.states_destination = states_set(destination_trace)
        result.samples = self.samples
        if result.devices and result.devices[0].size_bytes:
            with contextlib.suppress(LabError):
                library = (await self.source.servers[0].status()).get("library", {})
                result.versions["libvfio-user"] = str(library.get("api", "unknown"))


def _brief(answer: Any) -> dict[str, Any]:
    """Return what a sample keeps of a server's status; the transitions alone would make it megabytes."""
    if isinstance(answer, BaseException):
        return {"error": str(answer)}
    brief = {key: answer.get(key) for key in ("state", "initial_bytes", "dirty_bytes")}
    save, load = answer.get("save") or {}, answer.get("load") or {}
    brief.update({key: save.get(key) for key in ("precopy_bytes", "stop_copy_bytes", "passes")})
    brief["received_bytes"] = load.get("received_bytes")
    return brief


async def run(
    options: MigrateOptions, logs: Path, command: list[str], observer: Observer | None = None
) -> MigrationResult:
    """Carry out the whole experiment and return its result; failures are in it, not raised."""
    features = qemu_features(options.qemu)
    result = MigrationResult(started=time.time(), command=command, logs=str(logs))
    result.settings = {key: _plain(value) for key, value in asdict(options).items()}
    result.versions = {"vfu-dev": __version__, "python": platform.python_version(), "qemu": features.version}
    result.qemu.version, result.qemu.accel = features.version, options.accel
    if options.guest_image is None:
        result.qemu.accel = "qtest"
    result.qemu.downtime_limit_ms = options.downtime_limit_ms
    async with Lab(options, logs, observer) as lab:
        result.qemu.parameters = lab.parameters()
        try:
            await _run_steps(lab, result)
        except (ProcessError, QmpError, LabError, OSError) as error:
            result.problems.append(str(error))
        await lab.collect(result)
    result.ended = time.time()
    judge(result, options.pre_copy)
    return result


async def _run_steps(lab: Lab, result: MigrationResult) -> None:
    if not qemu_features(lab.options.qemu).migration:
        raise LabError(
            f"{lab.options.qemu} cannot migrate vfio-user devices (QEMU {result.qemu.version} without the "
            "project's patches); run: vfu-dev build qemu"
        )
    await lab.start()
    try:
        reply = await lab.migrate()
    except TimeLimitError as error:
        stood = lab.convergence
        limit = lab.options.timeout_seconds
        result.problems.append(f"not finished within {limit:g} s: {stood.text}" if stood else str(error))
        await lab.give_up()
        return
    if reply["status"] != "completed":
        return
    await lab.wait_running(lab.destination.qemu)
    lab.observe("phase", {"text": "moved; the guest goes on writing on the destination"})
    await lab.guest.follow(lab.destination.qemu)
    await asyncio.sleep(lab.options.settle_seconds)
    await lab.guest.stop()
    lab.observe("phase", {"text": "the guest reads everything back"})
    result.guest = await lab.guest.verify(
        lambda done, total: lab.observe("verify", {"compared_bytes": done, "total_bytes": total})
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


GuestKind = Literal["linux", "none"]
