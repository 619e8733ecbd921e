"""Device state through real QEMU: what our server adds to what QEMU itself takes, beside the peer in C."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns
from vfu_dev.bench.front_ends import MIB, Machine
from vfu_dev.bench.mmio import C_SERVER
from vfu_dev.bench.peers import Bench, Served
from vfu_dev.builds.qemu_binary import VFIO_USER_PCI, QemuBinary, find_qemu

# 1 GiB in a full run: as large as what is to stand still for less than a second.
TIMES_THE_MEMORY = 16


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
        )
        yield figure("qemu-in/rate", "MiB/s", pairs, C_SERVER)


def _into(
    runner: asyncio.Runner, bench: Bench, binary: QemuBinary, server: Served, file: Path, size_mib: int
) -> float:
    machine = Machine(binary, VFIO_USER_PCI, server, incoming=True)
    try:
        runner.run(machine.start())
        return runner.run(machine.load(f"file:{file}", size_mib * MIB))
    finally:
        runner.run(machine.stop())
        bench.stop(server)
