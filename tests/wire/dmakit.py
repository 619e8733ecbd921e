"""A driver for the reference device's DMA engine and writer, over the client."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from serverkit import wait_until
from streamkit import read_all

from vfu_dev.client import VfioUserDevice
from vfu_dev.device.reference.layout import CTRL_START, DESCRIPTOR, FIELDS, Op, Status, WriterStatus
from vfu_dev.uapi import (
    VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX,
    DeviceState,
)

KIB, MIB = 1 << 10, 1 << 20
OFFSETS = {field.name: (field.offset, field.format) for field in FIELDS}
PCI_COMMAND, MEMORY_AND_MASTER = 0x04, 0x06


@dataclass
class Outcome:
    """What a descriptor says afterwards."""

    status: Status
    result: int


class Driver:
    """Registers by name, and descriptors in a table at `table` (in shared guest memory)."""

    def __init__(self, device: VfioUserDevice, table: int = 0x10000, *, master: bool = True) -> None:
        self.device = device
        self.table = table
        if master:
            self.set_command(MEMORY_AND_MASTER)

    def set_command(self, value: int) -> None:
        """Write the PCI command register."""
        self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, PCI_COMMAND, struct.pack("<H", value))

    def __getitem__(self, name: str) -> int:
        offset, kind = OFFSETS[name]
        data = self.device.region_read(VFIO_PCI_BAR0_REGION_INDEX, offset, np.dtype(kind).itemsize)
        return int.from_bytes(data, "little")

    def __setitem__(self, name: str, value: int) -> None:
        offset, kind = OFFSETS[name]
        data = value.to_bytes(np.dtype(kind).itemsize, "little")
        self.device.region_write(VFIO_PCI_BAR0_REGION_INDEX, offset, data)

    def memory(self, address: int, count: int) -> memoryview:
        """Return the client's view of guest memory, which one region holds."""
        for region in self.device.dma.regions.values():
            start = address - region.iova
            if start >= 0 and start + count <= region.size_bytes:
                return memoryview(region.memory)[start : start + count]
        raise KeyError(hex(address))

    def put(self, *descriptors: dict[str, Any]) -> None:
        """Write descriptors into the table."""
        rows = np.zeros(len(descriptors), dtype=DESCRIPTOR)
        for row, fields in zip(rows, descriptors, strict=True):
            for name, value in fields.items():
                row[name] = value
        self.memory(self.table, rows.nbytes)[:] = rows.tobytes()

    def outcomes(self, count: int) -> list[Outcome]:
        """Read the table back."""
        raw = bytes(self.memory(self.table, count * DESCRIPTOR.itemsize))
        rows = np.frombuffer(raw, dtype=DESCRIPTOR)
        return [Outcome(Status(int(row["status"])), int(row["result"])) for row in rows]

    def start(self, count: int, table: int | None = None) -> None:
        """Start the engine on `count` descriptors."""
        self["dma_table"] = self.table if table is None else table
        self["dma_count"] = count
        self["dma_ctrl"] = CTRL_START

    def finish(self) -> Status:
        """Wait until no run is under way and return how it ended."""
        return wait_until(lambda: (s := Status(self["dma_status"])) is not Status.BUSY and [s], "DMA ends")[0]  # type: ignore[no-any-return]

    def run(self, *descriptors: dict[str, Any]) -> list[Outcome]:
        """Carry out descriptors; the run itself must come to its end."""
        self.put(*descriptors)
        self.start(len(descriptors))
        assert self.finish() is Status.IDLE
        return self.outcomes(len(descriptors))

    def one(self, op: Op | int, **fields: Any) -> Outcome:
        """Carry out one descriptor."""
        return self.run({"op": op, **fields})[0]

    def write_on(self, buffer: int, length: int, rate: int) -> WriterStatus:
        """Start the autonomous writer."""
        self["writer_buffer"], self["writer_length"], self["writer_rate"] = buffer, length, rate
        self["writer_ctrl"] = 1
        return WriterStatus(self["writer_status"])


def carry(source: VfioUserDevice, target: VfioUserDevice) -> None:
    """Move device state, and guest memory as it is at the stop; the target is RUNNING, the source stopped."""
    source.migration.set_state(DeviceState.STOP_COPY)
    for region in source.dma.regions.values():
        target.dma.regions[region.iova].memory[:] = region.memory[:]
    stream = read_all(source, 1 << 20)
    target.migration.set_state(DeviceState.RESUMING)
    target.migration.write(stream)
    target.migration.set_state(DeviceState.RUNNING)
