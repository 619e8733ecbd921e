"""The rate of the device's DMA engine, and the latency of a guest's MMIO during DMA."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator

import numpy as np

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns, percentiles
from vfu_dev.bench.peers import Bench, BenchError
from vfu_dev.bench.raw import Nanoseconds
from vfu_dev.client import VfioUserDevice
from vfu_dev.device.reference.layout import (
    CTRL_ABORT,
    CTRL_START,
    DESCRIPTOR,
    FLAG_INTERRUPT,
    REGISTERS,
    Op,
    Status,
)
from vfu_dev.uapi import (
    VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
)

MIB = 1 << 20
TABLE, DATA = 0x1000, 0x100000  # guest addresses
COMMAND, MEMORY_AND_MASTER = 0x04, 0x06  # <linux/pci_regs.h>
RUN_SECONDS = 120.0
DESCRIPTORS = 1024  # one run, which must outlast many reads: each fills the device's whole memory
PIECE_READS = 50
COPIES = 8  # descriptors of one measured run, and copies of the peer: starting and waking are not the rate
ID_BYTES = 4


def engine(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure MiB per second of a run of descriptors; the peer is numpy copying the same bytes as often."""
    size = effort.memory_mib * MIB
    server = bench.ours(effort.memory_mib)
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)

    def copy() -> float:
        began = time.perf_counter()
        for _ in range(COPIES):
            np.copyto(target, source)
        return COPIES * size / MIB / (time.perf_counter() - began)

    copy()
    with VfioUserDevice.connect(server.socket) as device:
        device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, COMMAND, MEMORY_AND_MASTER.to_bytes(2, "little"))
        table = device.dma_map(0, DATA)
        device.dma_map(DATA, size)
        (done,) = device.enable_irqs(VFIO_PCI_MSIX_IRQ_INDEX, 1)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, done)
            # Nothing may look at the memory when it is unmapped.
            view = undo.enter_context(memoryview(table.memory))
            for op in (Op.TO_DEVICE, Op.TO_GUEST):
                run = _run(device, view, done, op, size)
                run()
                name = f"dma-{op.name.lower().replace('_', '-')}/rate"
                yield figure(name, "MiB/s", in_turns(effort.rounds, run, copy), "numpy copies")
            busy = _reads_during(device, view, size, effort.calls)
            pairs = in_turns(effort.rounds, busy, lambda: _reads(device, effort.calls))
            yield from percentiles("mmio-dma", pairs, "engine idle")


def _reads(device: VfioUserDevice, calls: int) -> Nanoseconds:
    """Return the latency of each of `calls` reads of a register."""
    found = np.empty(calls, np.int64)
    for number in range(calls):
        began = time.perf_counter_ns()
        device.region_read(VFIO_PCI_BAR0_REGION_INDEX, 0, ID_BYTES)
        found[number] = time.perf_counter_ns() - began
    return found


def _reads_during(
    device: VfioUserDevice, table: memoryview, size: int, calls: int
) -> Callable[[], Nanoseconds]:
    """Return a function that reads while the engine runs, and then aborts the engine's run.

    Reads are made in batches. A batch counts if the engine was busy before and after it: the length of the
    engine's run depends on the machine.
    """

    def read() -> Nanoseconds:
        rows = np.zeros(DESCRIPTORS, DESCRIPTOR)
        rows["op"], rows["length"] = Op.FILL_DEVICE, size
        table[TABLE : TABLE + rows.nbytes] = rows.tobytes()
        pieces: list[Nanoseconds] = []
        deadline = time.monotonic() + RUN_SECONDS
        while sum(map(len, pieces)) < calls:
            if time.monotonic() > deadline:
                raise BenchError(f"the DMA engine was not busy for {calls} reads within {RUN_SECONDS:.0f} s")
            if _status(device) is not Status.BUSY:
                _prepare(device, DESCRIPTORS)
                _put(device, "dma_ctrl", CTRL_START)
            found = _reads(device, min(PIECE_READS, calls))
            if _status(device) is Status.BUSY:
                pieces.append(found)
        _put(device, "dma_ctrl", CTRL_ABORT)
        while _status(device) is Status.BUSY:
            pass
        return np.concatenate(pieces)[:calls]

    return read


def _put(device: VfioUserDevice, name: str, value: int) -> None:
    field = REGISTERS[name]
    device.region_write(VFIO_PCI_BAR0_REGION_INDEX, field.offset, field.encode(value))


def _status(device: VfioUserDevice) -> Status:
    field = REGISTERS["dma_status"]
    found = device.region_read(VFIO_PCI_BAR0_REGION_INDEX, field.offset, field.size_bytes)
    return Status(int.from_bytes(found, "little"))


def _prepare(device: VfioUserDevice, descriptors: int) -> None:
    _put(device, "dma_table", TABLE)
    _put(device, "dma_count", descriptors)


def _run(device: VfioUserDevice, table: memoryview, done: int, op: Op, size: int) -> Callable[[], float]:
    """Return a function that has `COPIES` descriptors done; the last one's interrupt, `done`, ends the time.

    A client that polled instead would take the engine's time.
    """

    def run() -> float:
        rows = np.zeros(COPIES, DESCRIPTOR)
        rows["op"], rows["address"], rows["length"] = op, DATA, size
        rows["flags"][-1] = FLAG_INTERRUPT
        there = slice(TABLE, TABLE + rows.nbytes)
        table[there] = rows.tobytes()
        _prepare(device, COPIES)
        began = time.perf_counter()
        _put(device, "dma_ctrl", CTRL_START)
        if not select.select([done], [], [], RUN_SECONDS)[0]:
            raise BenchError(f"DMA of {COPIES} x {size} bytes is not done after {RUN_SECONDS:g} s")
        seconds = time.perf_counter() - began
        os.eventfd_read(done)
        ended = np.frombuffer(table[there], DESCRIPTOR)["status"].tolist()
        if ended != [Status.DONE] * COPIES:
            raise BenchError(f"DMA ended with {', '.join(Status(one).name for one in ended)}")
        return COPIES * size / MIB / seconds

    return run
