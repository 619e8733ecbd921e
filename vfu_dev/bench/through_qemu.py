"""Device state through real QEMU: what our server adds to what QEMU itself takes, beside the peer in C."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns
from vfu_dev.bench.front_ends import MIB, Machine
from vfu_dev.bench.mmio import C_SERVER
from vfu_dev.bench.peers import Bench, BenchError, Served
from vfu_dev.builds.qemu_binary import VFIO_USER_PCI, QemuBinary, find_qemu

# 1 GiB in a full run: as large as what is to stand still for less than a second.
TIMES_THE_MEMORY = 16

# For a source whose VM is stopped. QEMU 10.2, migration/migration.c, completes without a look at the device
# if it has sent all RAM within 100 ms. From then on it compares the device's whole state with what this
# bandwidth, or else the measured one, moves within downtime-limit; with the measured one it never completed.
COMPLETE_ANYWAY = {"avail_switchover_bandwidth": 1 << 60}


def state(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """MiB a second of device state that QEMU reads from a device and sends, and writes to one from a file."""
    binary, size = find_qemu("patched"), effort.memory_mib * TIMES_THE_MEMORY
    servers = bench.ours(size), bench.reference(size)
    files = [bench.file(f"{server.socket.stem}.vm") for server in servers]
    with asyncio.Runner() as runner:
        machines = [Machine(binary, VFIO_USER_PCI, server) for server in servers]
        try:
            for machine in machines:
                runner.run(machine.start())

            def out(number: int) -> float:
                return runner.run(machines[number].save("exec:cat >/dev/null"))

            out(0), out(1)
            pairs = in_turns(effort.rounds, lambda: out(0), lambda: out(1))
            yield figure("qemu-out/rate", "MiB/s", pairs, C_SERVER)
            for machine, file in zip(machines, files, strict=True):
                runner.run(machine.save(f"file:{file}"))
        finally:
            for machine in machines:
                runner.run(machine.stop())
        for server in servers:
            bench.stop(server)

        def into(server: Served, file: Path) -> float:
            return _into(runner, bench, binary, server, file, size)

        pairs = in_turns(
            effort.rounds,
            lambda: into(bench.ours(size, fill=0), files[0]),
            lambda: into(bench.reference(size, fill=0), files[1]),
            touched_bytes=3 * size * MIB,
        )
        yield figure("qemu-in/rate", "MiB/s", pairs, C_SERVER)


def downtime(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Milliseconds that a device stands still while QEMU moves it to another QEMU, without pre-copy.

    The VM is stopped before its migration. VFIO then goes from STOP to STOP_COPY, whatever the device
    supports, so it is the same for our server and for the peer, which has no option against pre-copy.
    """
    binary, size = find_qemu("patched"), effort.memory_mib * TIMES_THE_MEMORY
    with asyncio.Runner() as runner:
        sources = [
            Machine(binary, VFIO_USER_PCI, server) for server in (bench.ours(size), bench.reference(size))
        ]
        try:
            for source in sources:
                runner.run(source.start())
                runner.run(source.qemu.execute("migrate-set-parameters", **COMPLETE_ANYWAY))

            def moved(source: Machine, server: Served) -> float:
                return _moved(runner, bench, binary, source, server, size * MIB)

            pairs = in_turns(
                effort.rounds,
                lambda: moved(sources[0], bench.ours(size, fill=0)),
                lambda: moved(sources[1], bench.reference(size, fill=0)),
                touched_bytes=3 * size * MIB,
            )
        finally:
            for source in sources:
                runner.run(source.stop())
        yield figure("qemu-downtime/all", "ms", pairs, C_SERVER)


def _moved(
    runner: asyncio.Runner,
    bench: Bench,
    binary: QemuBinary,
    source: Machine,
    server: Served,
    state_bytes: int,
) -> float:
    """Move the device of `source` to the empty `server`; return the milliseconds until it runs there."""
    destination = Machine(binary, VFIO_USER_PCI, server, incoming=True)
    uri = f"unix:{bench.file(f'{server.socket.stem}.migration')}"

    async def move() -> float:
        await destination.start()
        await destination.qemu.execute("migrate-incoming", uri=uri)
        await source.qemu.execute("stop")
        seen, began = len(destination.qemu.events), time.monotonic()
        await source.qemu.execute("migrate", uri=uri)
        await destination.arrived(seen)
        await destination.qemu.execute("cont")
        took = time.monotonic() - began
        transferred = (await source.saved())["vfio"]["transferred"]
        if transferred < state_bytes:
            raise BenchError(f"QEMU moved {transferred} bytes of device state, not {state_bytes}")
        return took * 1000

    try:
        return runner.run(move())
    finally:
        runner.run(destination.stop())
        bench.stop(server)


def _into(
    runner: asyncio.Runner, bench: Bench, binary: QemuBinary, server: Served, file: Path, size_mib: int
) -> float:
    machine = Machine(binary, VFIO_USER_PCI, server, incoming=True)
    try:
        runner.run(machine.start())
        return runner.run(machine.resume(f"file:{file}", size_mib * MIB))
    finally:
        runner.run(machine.stop())
        bench.stop(server)
