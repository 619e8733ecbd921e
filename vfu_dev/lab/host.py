"""One host of a migration: device servers and the QEMU attached to them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfu_dev.attach.front_end import choose_front_end
from vfu_dev.builds.qemu_binary import common_machine, probe_qemu
from vfu_dev.errors import LabError
from vfu_dev.figures import Sample, Snapshot
from vfu_dev.lab.options import MigrateOptions, QemuChoice
from vfu_dev.lab.result import QemuSide
from vfu_dev.vm.any_server import AnyServer
from vfu_dev.vm.qemu import Qemu, QemuOptions
from vfu_dev.vm.servers import ControlledServer, DeviceServer, ServerOptions
from vfu_dev.workload import Workload

Fetched = tuple[Snapshot, list[Sample]] | LabError


class Host:
    """One host. `name` never changes; its role, source or destination, changes with each move.

    Args: choice: its QEMU; by default that of its role in the first move.
    """

    def __init__(
        self,
        name: str,
        sockets: Path,
        logs: Path,
        options: MigrateOptions,
        incoming: bool,
        choice: QemuChoice | None = None,
    ) -> None:
        self.name = name
        self.choice = choice or (options.qemu_incoming if incoming else options.qemu_source)
        self.logs = logs
        server = ServerOptions(
            memory_bytes=options.memory_bytes,
            page_size=options.page_size,
            access=options.access,
            pre_copy=options.pre_copy,
            fill=0 if incoming else options.fill,
            library=options.library,
            faults=options.faults_destination if incoming else options.faults_source,
            own=options.own_device,
            extra=options.server_extra,
        )
        self._sockets, self._server_options = sockets, server
        self._command, self._role = list(options.server), "destination" if incoming else "source"
        self.servers = [self._make_server(index) for index in range(options.devices)]
        machine = QemuOptions(
            binary=self.choice.binary,
            ram_bytes=options.ram_bytes,
            front_end=self.choice.front_end,
            iommu=self.choice.iommu,
            machine=options.machine or common_machine(*(probe_qemu(one.binary) for one in _both(options))),
            ram=options.ram,
            environment=options.qemu_environment,
            preload_log=options.preload_log,
            accel=options.accel,
            within=self.choice.within,
            guest=options.guest_image,
            incoming=incoming,
            traces=options.traces,
            spare_ports=options.spare_ports,
            reboot=options.reboot,
            extra=options.qemu_extra,
        )
        spare = [self._make_server(options.devices + index).socket for index in range(options.spare_ports)]
        devices = [server.socket for server in self.servers]
        self.qemu = Qemu(name, sockets, logs, machine, devices, spare)

    def _make_server(self, index: int) -> DeviceServer | AnyServer:
        name = f"{self.name}-vfu{index}"
        if self._command:
            return AnyServer(name, self._sockets, self.logs, self._command, self._role)
        return DeviceServer(name, self._sockets, self.logs, self._server_options)

    def require_migration(self) -> None:
        """Raise LabError, which says what to do, if its QEMU leaves the devices out of a migration."""
        require_migration(self.choice)

    def describe(self) -> QemuSide:
        """Return which QEMU it has, and how that gets the devices."""
        qemu = self.qemu
        return QemuSide(qemu.binary.version, qemu.front_end.name, qemu.front_end.iommu)

    async def start(self) -> None:
        """Start the servers, then QEMU. Raises: ProcessError, LabError."""
        await asyncio.gather(*(server.start() for server in self.servers))
        await self.qemu.start()

    async def stop(self) -> None:
        """Stop QEMU, then the servers."""
        await self.qemu.stop()
        await asyncio.gather(*(server.stop() for server in self.servers))

    async def load(self, load: Workload) -> list[str]:
        """Start the servers' own engines; device i has the load's seed plus i, as a guest does it.

        Returns: the devices that have no memory to write to; a class of the user's own may have none.
        """
        without = []
        for index, server in enumerate(self.servers):
            if not server.has_control:
                continue
            if (await server.status())["memories"]:
                await server.command("load", load=replace(load, seed=load.seed + index).to_dict())
            else:
                without.append(f"vfu{index}")
        return without

    async def plug(self) -> None:
        """Serve one more device and plug it into the first free root port.

        Raises: ProcessError, QmpError: it is not served, or QEMU refuses it; then all is as before.
        """
        server = self._make_server(len(self.servers))
        server.remove_sockets()  # of a killed server: they would be taken for this one's
        try:
            await server.start()
            await self.qemu.plug(len(self.servers), server.socket)
        except LabError:
            await server.stop()
            raise
        self.servers.append(server)

    async def unplug(self) -> None:
        """Have the guest give the last device back, and end its server. Raises: LabError: it does not."""
        await self.qemu.unplug(len(self.servers) - 1)
        await self.servers.pop().stop()

    async def change_faults(self, faults: tuple[str, ...]) -> None:
        """Disarm every fault of this host's servers and arm `faults`. Raises: LabError: one is refused."""
        for server in self.servers:
            await server.command("fault", clear="all")
            for text in faults:
                await server.command("fault", fault=text)

    def remove_logs(self) -> None:
        """Remove what a stopped host logged."""
        for pattern in (f"{self.name}.log", f"{self.name}-*.log", f"server-{self.name}-*.log"):
            for path in self.logs.glob(pattern):
                path.unlink(missing_ok=True)

    async def fetch_figures(self) -> list[Fetched]:
        """Return what `DeviceServer.fetch_figures` says of each server; of one that is gone, the error."""
        return await fetch_all(self.servers)


async def fetch_all(servers: Sequence[ControlledServer]) -> list[Fetched]:
    """Return what `fetch_figures` says of each server; of one that is gone, the error."""

    async def one(server: ControlledServer) -> Fetched:
        try:
            return await server.fetch_figures()
        except LabError as error:
            return error

    return await asyncio.gather(*(one(server) for server in servers))


def require_migration(choice: QemuChoice) -> str:
    """Return the version of a QEMU that migrates the devices.

    Raises: LabError: it leaves them out; says what to do. QemuBinaryError: it does not attach them.
    """
    binary = probe_qemu(choice.binary)
    front_end = choose_front_end(binary, choice.front_end)
    if not binary.front_ends[front_end]:
        raise LabError(
            f"{binary.path} (QEMU {binary.version}) does not migrate devices through {front_end}; "
            "use --front-end vfio-pci, or --qemu patched (vfu-dev build qemu)"
        )
    return binary.version


def _both(options: MigrateOptions) -> tuple[QemuChoice, QemuChoice]:
    return options.qemu_source, options.qemu_incoming


def brief(fetched: Fetched) -> dict[str, Any]:
    """Return what a sample keeps of a server; sizes are as of the server's own last sample."""
    if isinstance(fetched, LabError):
        return {"error": str(fetched)}
    snapshot, _ = fetched
    save = snapshot.save or dict.fromkeys(("precopy_bytes", "stop_copy_bytes", "passes"))
    return {
        "state": snapshot.state,
        "initial_bytes": snapshot.forecast["initial_bytes"],
        "dirty_bytes": snapshot.forecast["dirty_bytes"],
        **save,
        "received_bytes": snapshot.received_bytes,
    }
