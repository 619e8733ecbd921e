"""QEMU's two front ends in one binary: vfio-pci with the preloaded library, and vfio-user-pci.

The machine has no guest and writes no trace. vfio-pci's figures contain the library's cost: it catches a
system call and sends a message instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns
from vfu_dev.bench.peers import Bench, BenchError, Served
from vfu_dev.bench.raw import Nanoseconds
from vfu_dev.builds.qemu_binary import VFIO_PCI, VFIO_USER_PCI, QemuBinary, find_qemu
from vfu_dev.errors import LabError
from vfu_dev.vm.process import ProcessError
from vfu_dev.vm.qemu import Qemu, QemuOptions
from vfu_dev.vm.qtest import QtestClient
from vfu_dev.vm.qtest_guest import QtestGuest

Access = Callable[[int], Coroutine[object, object, object]]

MIB = 1 << 20
RAM_BYTES = 32 << 20
ACCESS_BYTES = 8
# Accesses per qtest command: enough to make the cost of the command itself negligible.
ACCESSES = 64
PEER = "vfio-user-pci"


class Machine:
    """One QEMU with one device."""

    def __init__(self, binary: QemuBinary, front_end: str, server: Served, *, incoming: bool = False) -> None:
        folder = server.socket.parent
        options = QemuOptions(
            binary.path, RAM_BYTES, front_end=front_end, incoming=incoming, traces=(), migration_events=False
        )
        self.qemu = Qemu(f"qemu-{server.socket.stem}", folder, folder, options, [server.socket])
        self._guest = QtestGuest()

    async def start(self) -> None:
        """Start QEMU. The lab does the firmware's work."""
        await self.qemu.start()
        events = [{"capability": "events", "state": True}]
        await self.qemu.execute("migrate-set-capabilities", capabilities=events)
        await self.qemu.execute("migrate-set-parameters", max_bandwidth=0, downtime_limit=1)

    async def ready(self) -> None:
        """Give the device's BARs addresses."""
        await self._guest.ready(self.qemu)

    async def stop(self) -> None:
        """End it."""
        if self._guest.client is not None:
            self._guest.client.close()
        await self.qemu.stop()

    @property
    def _client(self) -> QtestClient:
        assert self._guest.client is not None
        return self._guest.client

    async def reads(self, calls: int) -> Nanoseconds:
        """Return the latency of a read of 8 bytes of BAR2, as the mean of each 64 reads."""
        return await self._timed(calls, lambda place: self._client.read_block(place, ACCESSES * ACCESS_BYTES))

    async def writes(self, calls: int) -> Nanoseconds:
        """Return the same for writes. They wait for no reply, so a read follows each 64 of them."""
        data = bytes(range(1, ACCESS_BYTES + 1)) * ACCESSES

        async def write(place: int) -> None:
            await self._client.write_block(place, data)
            await self._client.read(ACCESS_BYTES, place)

        return await self._timed(calls, write)

    async def _timed(self, calls: int, access: Access) -> Nanoseconds:
        (device,) = self._guest.devices
        taken = []
        for number in range(max(1, calls // ACCESSES)):
            place = device.bar2 + number * 4096 % device.size_bytes
            began = time.perf_counter_ns()
            await access(place)
            taken.append((time.perf_counter_ns() - began) / ACCESSES)
        return np.array(taken).astype(np.int64)

    async def save(self, uri: str) -> float:
        """Migrate to `uri`, then run the VM; return MiB of device state per second. Raises: BenchError."""
        await self.qemu.execute("migrate", uri=uri)
        reply = await self.saved()
        return float(reply["vfio"]["transferred"] / MIB / (reply["total-time"] / 1000))

    async def saved(self) -> dict[str, Any]:
        """Wait until the VM is saved, and run it; return `query-migrate`. Raises: BenchError."""
        while (reply := await self.qemu.migration())["status"] in ("setup", "active", "device"):
            await asyncio.sleep(0.005)
        if reply["status"] != "completed":
            raise BenchError(f"the migration {reply['status']}: {reply.get('error-desc')}")
        # The migration is completed a moment before the VM may run, see qmp_cont() in QEMU.
        while (await self.qemu.execute("query-status"))["status"] == "finish-migrate":
            await asyncio.sleep(0.005)
        await self.qemu.execute("cont")
        return reply

    async def arrived(self, seen: int) -> None:
        """Wait for the event that an incoming migration has completed, not among the first `seen` events.

        The event has QEMU's time of day, which may be set. Callers measure durations with a monotonic clock.

        Raises: BenchError: it has not in time; says how far it is. ProcessError: QEMU ended.
        """
        try:
            await self.qemu.wait_event("MIGRATION", first=seen, status="completed")
        except ProcessError:
            raise
        except LabError as error:
            heard = [event["data"].get("status") for event in self.qemu.events[seen:]]
            now = (await self.qemu.migration()).get("status")
            raise BenchError(f"{error}; its events say {heard}, query-migrate says {now}") from error

    async def resume(self, uri: str, state_bytes: int) -> float:
        """Resume the VM from `uri`; return MiB of device state per second."""
        seen, began = len(self.qemu.events), time.monotonic()
        await self.qemu.execute("migrate-incoming", uri=uri)
        await self.arrived(seen)
        return state_bytes / MIB / (time.monotonic() - began)


def mmio_and_state(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Reads and writes of 8 bytes, and device state out and in, by both front ends of our QEMU in turns."""
    binary = find_qemu("patched")
    with asyncio.Runner() as runner:
        machines = {
            name: Machine(binary, name, bench.ours(effort.memory_mib)) for name in (VFIO_PCI, VFIO_USER_PCI)
        }
        try:
            for machine in machines.values():
                runner.run(machine.start())
                runner.run(machine.ready())
            yield from _mmio(runner, machines, effort)
            yield _out(runner, machines, effort)
            file = next(iter(machines.values())).qemu.qmp_socket.with_name("vm.state")
            runner.run(machines[VFIO_PCI].save(f"file:{file}"))
        finally:
            for machine in machines.values():
                runner.run(machine.stop())
        yield _into(runner, bench, binary, file, effort)


def _mmio(runner: asyncio.Runner, machines: dict[str, Machine], effort: Effort) -> Iterator[Figure]:
    for what in ("reads", "writes"):

        def taken(name: str, what: str = what) -> float:
            one = runner.run(getattr(machines[name], what)(effort.calls))
            return float(np.percentile(one, 50)) / 1000

        taken(VFIO_PCI), taken(VFIO_USER_PCI)
        pairs = in_turns(effort.rounds, lambda: taken(VFIO_PCI), lambda: taken(VFIO_USER_PCI))
        yield figure(f"front-end-{what}/p50", "us", pairs, PEER)


def _out(runner: asyncio.Runner, machines: dict[str, Machine], effort: Effort) -> Figure:
    def rate(name: str) -> float:
        return runner.run(machines[name].save("exec:cat >/dev/null"))

    rate(VFIO_PCI), rate(VFIO_USER_PCI)
    pairs = in_turns(effort.rounds, lambda: rate(VFIO_PCI), lambda: rate(VFIO_USER_PCI))
    return figure("front-end-out/rate", "MiB/s", pairs, PEER)


def _into(runner: asyncio.Runner, bench: Bench, binary: QemuBinary, file: Path, effort: Effort) -> Figure:
    state_bytes = effort.memory_mib * MIB

    def rate(name: str) -> float:
        server = bench.ours(effort.memory_mib, fill=0)
        machine = Machine(binary, name, server, incoming=True)
        try:
            runner.run(machine.start())
            return runner.run(machine.resume(f"file:{file}", state_bytes))
        finally:
            runner.run(machine.stop())
            bench.stop(server)

    pairs = in_turns(effort.rounds, lambda: rate(VFIO_PCI), lambda: rate(VFIO_USER_PCI))
    return figure("front-end-in/rate", "MiB/s", pairs, PEER)
