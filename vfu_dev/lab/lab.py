"""The processes of one move: two hosts, a guest, and the steps of moving it from one to the other.

`Lab` owns them; tests use its steps one by one. `vfu_dev.lab.migrate.run` is the whole of `vfu-dev lab
migrate`; `vfu_dev.series.shuttle` moves one running VM back and forth.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfu_dev.client.listening import remove_socket_folder, socket_folder
from vfu_dev.errors import LabError
from vfu_dev.lab.host import Host
from vfu_dev.lab.observer import MoveReporter, ObservedMove, remaining_bytes
from vfu_dev.lab.options import MigrateOptions, QemuChoice
from vfu_dev.lab.pausing import going_on, pauses
from vfu_dev.lab.policy import Policy, step_text
from vfu_dev.lab.remote import FarHost, FarRoute
from vfu_dev.lab.result import MigrationResult, QemuResult
from vfu_dev.lab.route import make_route
from vfu_dev.vm.guest import Guest, LinuxGuest
from vfu_dev.vm.qemu import Qemu
from vfu_dev.vm.qtest_guest import QtestGuest
from vfu_dev.workload import Workload


class Lab(ObservedMove):
    """The processes of one move; an async context manager that leaves nothing behind.

    `logs` is kept; sockets live in a short temporary path, because UNIX socket names end at 107 bytes. `far`
    is the destination's host where it is another machine.
    """

    source: Host
    destination: Host

    def __init__(
        self,
        options: MigrateOptions,
        logs: Path,
        reporter: MoveReporter | None = None,
        far: FarHost | None = None,
    ) -> None:
        super().__init__(options.devices, reporter)
        self.options = options
        self.timeout_seconds = options.timeout_seconds
        self.policy = Policy(options.policy)
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        if far is None:  # which has begun to write its own
            for old in logs.glob("*.log"):
                old.unlink(missing_ok=True)
        self.sockets = socket_folder("vfud-lab-")
        with contextlib.ExitStack() as made:  # what is refused leaves nothing behind either
            made.callback(remove_socket_folder, self.sockets)
            self.route = make_route(options, self.sockets) if far is None else FarRoute(far.far)
            made.callback(self.route.close)
            source = self.route.place(options.qemu_source, False)
            self.source = Host("source", self.sockets, logs, options, False, source)
            destination = self.route.place(options.qemu_incoming, True)
            self.destination = far or Host("destination", self.sockets, logs, options, True, destination)
            made.pop_all()
        known = options.own_device is None and not options.server
        self.guest: Guest = QtestGuest(known) if options.guest_image is None else LinuxGuest(drives=known)
        # The hosts are numbered: source is 1, destination 2, and each that comes later has the next number.
        self.hosts = 2
        self.moves = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """The migration parameters that this move has set, underscores for hyphens."""
        return self.options.qemu_parameters | self.policy.changed()

    @property
    def downtime_limit_ms(self) -> int:
        """The downtime limit that this move has set."""
        return self.policy.changed().get("downtime_limit", self.options.downtime_limit_ms)

    async def sample(self) -> dict[str, Any]:
        """Sample both sides and the route, keep the sample, and do what the policy makes of it."""
        row = await super().sample()
        row.update(self.route.sample())
        for step in self.policy.due(row, remaining_bytes(row)):
            self.reporter("phase", {"text": f"the policy sets {step_text(step)}"})
            await self.in_time(self.source.qemu.execute("migrate-set-parameters", **step["parameters"]))
        return row

    async def collect(self, result: MigrationResult) -> None:
        """Take what there is into `result`; parts that are gone stay empty and are among its problems."""
        await super().collect(result)
        result.link = self.route.describe(self.samples)
        result.policy = self.policy.steps
        result.qemu.downtime_limit_ms, result.qemu.parameters = self.downtime_limit_ms, self.parameters

    async def __aenter__(self) -> Lab:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop everything, whatever state it is in."""
        with contextlib.suppress(LabError, OSError):
            await self.guest.close()
        await asyncio.gather(self.source.stop(), self.destination.stop())
        self.route.close()
        remove_socket_folder(self.sockets)

    async def start(self) -> None:
        """Start both sides, wait for the guest, start the load. Raises: LabError."""
        self.reporter("phase", {"text": "starting servers and QEMU"})
        await self.source.start()
        await self.destination.start()
        guest = self.options.guest_image is not None
        waiting = "waiting for the guest" if guest else "no guest: the lab finds the devices itself"
        self.reporter("phase", {"text": waiting})
        await self.guest.ready(self.source.qemu)
        if not self.options.load.is_idle:
            self.reporter("phase", {"text": f"the load starts: {self.options.writer} writes"})
        await self._start_load()
        await asyncio.sleep(self.options.warmup_seconds)

    def require_migration(self) -> None:
        """Raise LabError, which says what to do, if a QEMU leaves the devices out of a migration."""
        for side in (self.source, self.destination):
            side.require_migration()

    def describe_sides(self, result: QemuResult) -> None:
        """Write into `result` which QEMU is where now."""
        result.machine = self.source.qemu.options.machine
        result.read_sides(self.source.describe(), self.destination.describe())

    async def _start_load(self) -> None:
        if self.options.load_place == "guest":
            await self.guest.start(self.options.load)
        else:
            await self.guest.start(Workload("idle"))
            await self._load_devices(self.source)

    async def _load_devices(self, host: Host) -> None:
        for name in await host.load(self.options.load):
            self.reporter("phase", {"text": f"{name} has no memory that migrates: nothing is written"})

    async def pause(self) -> None:
        """Stop the VM, devices included, so that another one has the machine. Raises: LabError."""
        await self.source.qemu.execute("stop")

    async def go_on(self) -> None:
        """Let the VM run on after `pause`; its load goes on. Raises: LabError."""
        await self.source.qemu.execute("cont")
        await self.wait_running(self.source.qemu)
        if isinstance(self.guest, QtestGuest):
            await self.guest.follow(self.source.qemu)

    async def plug(self, *, both: bool = False) -> None:
        """Plug one more device into a spare port of the source's VM.

        Args: both: plug one into the destination too. Otherwise that is replaced by a machine which has it
              from the start.
        Raises: LabError, ProcessError.
        """
        await self.source.plug()
        await self._devices_changed(1)
        if both:
            await self.destination.plug()
        else:
            await self.replace_destination()

    async def unplug(self) -> None:
        """Take the last device from the source's VM, whose guest agrees, and replace the destination."""
        await self.source.unplug()
        await self._devices_changed(-1)
        await self.replace_destination()

    async def _devices_changed(self, more: int) -> None:
        options = self.options
        self.options = replace(
            options, devices=options.devices + more, spare_ports=options.spare_ports - more
        )
        self.snapshots = [None] * self.options.devices
        self.server_samples = [[] for _ in self.source.servers]
        await self.forget()

    async def configure(self, *qemus: Qemu, return_path: bool = True) -> None:
        """Set migration capabilities and parameters on `qemus`; both sides when none is named.

        With a return path the source waits for the destination's confirmation. Without one, as for a file,
        the source completes when everything is sent, whether or not it is accepted.
        """
        capabilities = self.options.qemu_capabilities(return_path=return_path)
        for qemu in qemus or (self.source.qemu, self.destination.qemu):
            await qemu.execute("migrate-set-capabilities", capabilities=capabilities)
            await qemu.execute("migrate-set-parameters", **self.options.qemu_parameters)

    async def listen(self) -> str:
        """Make the destination listen and return the address to migrate to."""
        return await self.route.listen(self.destination.qemu)

    async def replace_destination(
        self, options: MigrateOptions | None = None, choice: QemuChoice | None = None
    ) -> None:
        """Stop the destination and start a fresh one (QEMU cannot receive twice), by default of its kind."""
        await self.destination.stop()
        old = self.destination
        options, choice = options or self.options, choice or old.choice
        self.destination = Host(old.name, self.sockets, self.logs, options, incoming=True, choice=choice)
        await self.destination.start()

    async def begin(self, uri: str) -> None:
        """Start the outgoing migration. Raises: QmpError: refused (a blocker, say)."""
        await self.source.qemu.execute("migrate", uri=uri)

    async def migrate(self) -> dict[str, Any]:
        """Configure, listen, migrate and wait for the end; return the last `query-migrate`."""
        self.policy = Policy(self.options.policy)
        await self.configure()
        uri = await self.listen()
        self.reporter("phase", {"text": "migrating"})
        answering = going_on(self.source.qemu, self.options.timeout_seconds)
        async with answering if pauses(self.options) else contextlib.nullcontext():
            await self.begin(uri)
            return await self.wait_final()

    async def follow(self) -> None:
        """Go on with guest and load on the destination, where the VM now runs. Raises: LabError."""
        if self.options.load_place == "device":
            # The servers' engines are no part of the device's state: theirs ended with the source.
            await self._load_devices(self.destination)
        await self.guest.follow(self.destination.qemu)

    async def move(self) -> MigrationResult:
        """Move the VM and go on with its load on the destination; return the result, not yet checked.

        `turn_around` makes the next move possible.

        Raises: TimeLimitError: it does not end; `give_up` cancels it. LabError: it ended otherwise than by
                "completed", or a process is gone.
        """
        result = MigrationResult(started=time.time())
        reply = await self.migrate()
        if reply["status"] != "completed":
            raise LabError(f"migration {reply['status']}: {reply.get('error-desc', 'no reason given')}")
        await self.wait_running(self.destination.qemu)
        self.moves += 1
        await self.follow()
        self.describe_sides(result.qemu)
        await self.collect(result)
        result.ended = time.time()
        return result

    async def turn_around(self, keep_logs: bool = False, choice: QemuChoice | None = None) -> None:
        """After a completed move: stop the old source, start a fresh destination, and swap the roles.

        What this move left is forgotten: samples, and the old source's logs unless `keep_logs`. The guest
        must have followed (`move` has seen to it). Faults go with the role, not with the host.

        Args: choice: the fresh destination's QEMU; by default that of the old source.

        Raises: LabError, ProcessError: the fresh side does not start; the VM runs on, on what is now
                the source.
        """
        old, self.source = self.source, self.destination
        self.hosts += 1
        name = f"host{self.hosts}"
        choice = choice or old.choice
        self.destination = Host(name, self.sockets, self.logs, self.options, incoming=True, choice=choice)
        # One after the other: so there are never more than two hosts, and never three of a big device.
        await old.stop()
        if not keep_logs:
            old.remove_logs()
        for server in old.servers:
            server.remove_sockets()
        await self.destination.start()
        if self.options.faults_source != self.options.faults_destination:
            await self.source.change_faults(self.options.faults_source)
        await self.forget()
        self.roles_since = time.time()

    async def give_up(self) -> None:
        """Cancel the migration, so that the VM goes on at the source. Raises: LabError."""
        self.reporter("phase", {"text": "giving up: cancelling the migration"})
        await self.cancel()
