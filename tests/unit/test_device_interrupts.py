"""Interrupts and workers of a device that has to be quiet."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from vfu_dev.device import Device, Field, Msix, Registers
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.device.reference.dma import STATE
from vfu_dev.device.reference.layout import DESCRIPTOR, STAMP_PAGE_BYTES, Op, Status, WriterStatus
from vfu_dev.device.reference.writer import expected_pages, stamp_words
from vfu_dev.errors import ConfigError, StreamError
from vfu_dev.testing import InMemoryBus, InMemoryClient
from vfu_dev.uapi import VFIO_PCI_INTX_IRQ_INDEX
from vfu_dev.uapi import DeviceState as S

IRQ_RAISE = 0x20


class FlatMemory:
    """Guest memory as one array from address 0."""

    def __init__(self, count: int) -> None:
        self.data = bytearray(count)

    def check(self, address: int, count: int, *, write: bool) -> None:
        """Accept what is there."""
        assert 0 <= address <= address + count <= len(self.data), (address, count, write)

    def read(self, address: int, out: memoryview) -> None:
        """Copy out."""
        self.check(address, len(out), write=False)
        out[:] = self.data[address : address + len(out)]

    def write(self, address: int, data: memoryview | bytes) -> None:
        """Copy in."""
        self.check(address, len(data), write=True)
        self.data[address : address + len(data)] = data


class FlatBus(InMemoryBus):
    """The bus of one machine, before memory that another one may have as well."""

    def __init__(self, memory: FlatMemory) -> None:
        super().__init__()
        self.memory = memory

    def check(self, address: int, count: int, *, write: bool) -> None:
        """See `FlatMemory`."""
        self.memory.check(address, count, write=write)

    def read(self, address: int, out: memoryview) -> None:
        """See `FlatMemory`."""
        self.memory.read(address, out)

    def write(self, address: int, data: memoryview | bytes) -> None:
        """See `FlatMemory`."""
        self.memory.write(address, data)


class Machine:
    """A device with guest memory and a place where its interrupts arrive."""

    def __init__(self, memory: FlatMemory | None = None) -> None:
        self.device = ReferenceDevice("test", memory_bytes=1 << 20)
        self.memory = memory or FlatMemory(1 << 20)
        self.bus = FlatBus(self.memory)
        self.raised = self.bus.irqs
        self.device.attach(self.bus)

    def raise_irq(self, vector: int) -> None:
        """Write the register that raises an interrupt."""
        self.device.registers.write(IRQ_RAISE, memoryview(struct.pack("<I", vector)))

    def start_dma(self, *rows: tuple[int, ...]) -> None:
        """Put (op, flags, address, offset, length, value, vector) rows at address 0 and start."""
        table = np.array([(*row, 0, 0) for row in rows], dtype=DESCRIPTOR)
        self.memory.write(0, table.tobytes())
        self.device.registers["dma_count"] = len(rows)
        self.device.dma.write_ctrl(1)

    def status(self, index: int) -> Status:
        """Return what descriptor `index` says."""
        return Status(int(np.frombuffer(self.memory.data, DESCRIPTOR, 1, 64 * index)["status"][0]))

    def migrate(self) -> Machine:
        """Move to another machine on the same guest memory, by STOP_COPY."""
        target = Machine(self.memory)
        self.device.migration.set_state(S.STOP_COPY)
        target.device.migration.set_state(S.RESUMING)
        buffer = memoryview(bytearray(1 << 16))
        while stored := self.device.migration.read_into(buffer):
            target.device.migration.write(buffer[:stored])
        target.device.migration.set_state(S.RUNNING)
        self.device.close()
        return target


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.device.close()


@pytest.mark.parametrize("state", [S.RUNNING_P2P, S.PRE_COPY_P2P])
def test_quiet_states_keep_interrupts_and_running_delivers_each_once(machine: Machine, state: S) -> None:
    migration = machine.device.migration
    machine.raise_irq(1)
    migration.set_state(state)
    for vector in (3, 0, 3):
        machine.raise_irq(vector)
    assert machine.raised == [1]
    assert machine.device.interrupts.pending == [0, 3]
    migration.set_state(S.RUNNING)
    assert machine.raised == [1, 0, 3]
    migration.set_state(state)
    migration.set_state(S.RUNNING)
    assert machine.raised == [1, 0, 3]


def test_a_pending_interrupt_is_delivered_by_the_destination_alone() -> None:
    source = Machine()
    source.device.migration.set_state(S.PRE_COPY_P2P)
    source.raise_irq(2)
    source.raise_irq(2)
    target = source.migrate()
    assert (source.raised, target.raised) == ([], [2])
    assert target.device.registers["irq_count"] == 2
    target.device.close()


def test_a_reset_forgets_what_is_pending(machine: Machine) -> None:
    machine.device.migration.set_state(S.PRE_COPY_P2P)
    machine.raise_irq(1)
    machine.device.reset(S.PRE_COPY_P2P, "test")
    machine.device.migration.set_state(S.RUNNING)
    assert machine.raised == []


def test_interrupts_that_do_not_exist_are_refused(machine: Machine) -> None:
    """Pending vectors, and causes of INTx; also those of a device that has no INTx at all."""

    class Messages(Device):
        registers = Registers(0, [Field("nothing", 0, "<u4", "rw", "")])
        msix = Msix(1, vectors=4)

    block = machine.device.interrupts.block()

    def content(pending: int, asserted: int) -> bytes:
        return pending.to_bytes(block.dtype.itemsize - 4, "little") + asserted.to_bytes(4, "little")

    block.validate(content(1 << 3, 1 << 3))
    for pending, asserted in ((1 << 4, 0), (0, 1 << 4), (1 << 2047, 0), (0, 1 << 31)):
        with pytest.raises(StreamError, match="4 vectors"):
            block.validate(content(pending, asserted))
    other = Messages()
    other.interrupts.block().validate(content(1 << 3, 0))
    with pytest.raises(StreamError, match="4 vectors"):
        other.interrupts.block().validate(content(0, 1))
    other.close()


@pytest.mark.parametrize("vector", [-1, -2048, 4, 1 << 70])
def test_an_interrupt_that_does_not_exist_is_ignored_and_counted(vector: int) -> None:
    class Ringer(Device):
        msix = Msix(1, vectors=4)

    with InMemoryClient(Ringer()) as client:
        client.device.raise_irq(vector)
        client.device.raise_irq(3)
        assert client.irqs == [3]
        assert (client.device.counters.irqs, client.device.counters.irq_errors) == (1, 1)


def test_intx_of_a_device_of_ones_own_needs_one_field() -> None:
    """Raised as INTx while the client uses that; what the guest writes back is acknowledged, and no more."""

    class Bell(Device):
        registers = Registers(0, [Field("causes", 0x4, "<u4", "intx", "who rang")])
        msi_vectors = 3

    bell, bus = Bell(), InMemoryBus()
    bus.kind = VFIO_PCI_INTX_IRQ_INDEX
    bell.attach(bus)
    assert (bell.irq_vectors, bell.msi_messages, bell.msix_vectors) == (3, 4, 0)
    for vector in (2, 0, 3):  # the last one does not exist
        bell.raise_irq(vector)
    assert (bell.registers["causes"], bus.line) == (0b101, True)
    bell.registers.write(0x4, memoryview(b"\x01"))
    assert (bell.registers["causes"], bus.line) == (0b100, True)
    bell.migration.set_state(S.STOP)
    assert (bell.registers["causes"], bus.line) == (0b100, False)
    bell.migration.set_state(S.RUNNING)
    assert bus.line is True
    bell.registers.write(0x0, memoryview(b"\xff" * 8))
    assert (bell.registers["causes"], bus.line) == (0, False)
    bell.raise_irq(1)
    bell.reset(S.RUNNING, "test")
    assert (bell.registers["causes"], bus.line) == (0, False)
    bell.close()


def test_two_registers_cannot_both_acknowledge() -> None:
    class Twice(Device):
        registers = Registers(0, [Field(name, at, "<u4", "intx", "") for name, at in (("a", 0), ("b", 4))])

    with pytest.raises(ConfigError, match="b: a second register"):
        Twice()


def test_what_nobody_noticed_is_taken_back_when_the_device_stops(machine: Machine) -> None:
    """And raised again when it runs, once for each vector; what was noticed is not."""
    machine.bus.unnoticed = {1, 3}
    for vector in (1, 2, 3, 3):
        machine.raise_irq(vector)
    machine.device.migration.set_state(S.STOP)
    assert machine.device.interrupts.pending == [1, 3]
    machine.device.migration.set_state(S.RUNNING)
    assert machine.raised == [1, 2, 3, 3, 1, 3]
    assert not machine.bus.unnoticed
    machine.device.migration.set_state(S.STOP)
    machine.device.migration.set_state(S.RUNNING)
    assert machine.raised == [1, 2, 3, 3, 1, 3]


def test_nothing_is_started_in_quiet_states(machine: Machine) -> None:
    """A doorbell rung by a peer's DMA is heard in P2P states, and answered when the device runs."""
    device = machine.device
    for state in (S.RUNNING_P2P, S.PRE_COPY_P2P):
        device.migration.set_state(state)
        machine.start_dma((Op.FILL_GUEST, 1, 8192, 0, 4096, 7, 2))
        assert device.dma.busy
        assert device.work_due() is None
        device.work(1)
        assert not any(machine.memory.data[8192:])
        device.migration.set_state(S.RUNNING)
        assert device.work_due() == 0
        device.work(1)
        assert machine.status(0) is Status.DONE
        assert machine.memory.data[8192:8200] == (7).to_bytes(8, "little")
        machine.memory.data[:] = bytes(len(machine.memory.data))
    assert machine.raised == [2, 2]


def test_a_transfer_goes_on_where_it_was_on_the_other_side() -> None:
    """Stopped between slices, in the second of three descriptors; the checksum is that of the whole."""
    source = Machine(FlatMemory(8 << 20))
    source.memory.data[1 << 20 :] = bytes(range(256)) * (7 << 12)
    fill = (Op.FILL_DEVICE, 0, 0, 4096, 4096, 9, 0)
    source.start_dma(fill, (Op.CHECKSUM_GUEST, 1, 1 << 20, 0, 7 << 20, 0, 1), fill)
    state = source.device.dma._state
    while not int(state["position"][0]) or int(state["index"][0]) != 1:
        source.device.dma.advance(0)
    target = source.migrate()
    assert target.device.dma.busy
    while target.device.work_due() == 0:
        target.device.work(0)
    assert [target.status(index) for index in range(3)] == [Status.DONE] * 3
    result = int(np.frombuffer(target.memory.data, DESCRIPTOR, 1, 64)["result"][0])
    assert result == zlib.crc32(target.memory.data[1 << 20 :])
    assert (source.raised, target.raised) == ([], [1])
    assert target.device.registers["dma_done"] == 3
    target.device.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"active": 2},
        {"active": 0, "fetched": 1},
        {"index": 3},
        {"count": 0},
        {"count": 5000},
        {"table": (1 << 64) - 64},
        {"position": 4096},
        {"op": 77},
        {"offset": 1 << 40},
        {"length": 0},
        {"vector": 9, "flags": 1},
        {"op": Op.FILL_GUEST, "address": (1 << 64) - 1},
    ],
)
def test_a_transfer_under_way_that_cannot_be_is_refused(machine: Machine, changes: dict[str, int]) -> None:
    """Every field that arrived is checked before it indexes anything."""
    block = machine.device.dma.block()
    assert block is not None
    state = np.zeros(1, dtype=STATE)
    good = {"active": 1, "fetched": 1, "count": 3, "index": 2, "position": 4095}
    for name, value in (good | changes).items():
        if name in good or name == "table":
            state[name] = value
    descriptor = {"op": Op.FILL_DEVICE, "length": 4096} | changes
    for name, value in descriptor.items():
        if name not in good and name != "table":
            state["descriptor"][name] = value
    with pytest.raises(StreamError):
        block.validate(state.tobytes())


def test_a_good_transfer_under_way_is_taken(machine: Machine) -> None:
    machine.start_dma((Op.FILL_DEVICE, 0, 0, 0, 1 << 20, 7, 0))
    machine.device.dma.advance(0)
    block = machine.device.dma.block()
    assert block is not None
    block.validate(block.pack())


def test_the_engine_ends_its_step_when_a_guest_waits_for_its_access(machine: Machine) -> None:
    """After a slice: there is progress each time, and none of it is more than that."""
    machine.start_dma((Op.FILL_DEVICE, 0, 0, 0, 3 * 4096, 7, 0), *[(Op.FILL_DEVICE, 0, 0, 0, 4096, 7, 0)] * 9)
    machine.bus.waiting = True
    for done in range(1, 4):
        machine.device.work(3600.0)
        assert machine.device.registers["dma_done"] == done
    machine.bus.waiting = False
    machine.device.work(3600.0)
    assert (machine.device.registers["dma_done"], machine.device.dma.busy) == (10, False)


def test_the_writer_stamps_what_it_says(machine: Machine) -> None:
    """On its way round and round a buffer that is no multiple of what it does at once."""
    registers, pages = machine.device.registers, 70
    registers["writer_buffer"], registers["writer_length"] = 8192, pages * STAMP_PAGE_BYTES
    registers["writer_rate"] = 1 << 30
    machine.device.writer.write_ctrl(1)
    while registers["writer_count"] < 3 * pages:
        machine.device.work(0.01)
    machine.device.writer.write_ctrl(0)
    assert (registers["writer_status"], registers["writer_ctrl"]) == (WriterStatus.STOPPED, 0)
    words = np.frombuffer(machine.memory.data, np.uint64, pages * 512, 8192).reshape(pages, 512)
    assert (words == expected_pages(pages, registers["writer_count"])[:, np.newaxis]).all()
    assert stamp_words(5, 2)[1] == stamp_words(0, 7)[6]


def test_the_writer_stops_when_what_is_under_way_is_written_and_counted(machine: Machine) -> None:
    """Transfers by message let the guest in between: to it, the writer goes on until then."""
    registers, memory = machine.device.registers, machine.memory
    registers["writer_buffer"], registers["writer_length"] = 8192, 8 * STAMP_PAGE_BYTES
    registers["writer_rate"] = 1 << 30
    seen: list[tuple[int, int]] = []

    class Interrupted(FlatMemory):
        """Memory during whose writes the guest stops the writer."""

        def write(self, address: int, data: memoryview | bytes) -> None:
            machine.device.writer.write_ctrl(0)
            seen.append((registers["writer_status"], registers["writer_count"]))
            super().write(address, data)

    interrupted = Interrupted(len(memory.data))
    machine.device.attach(FlatBus(interrupted))
    machine.device.writer.write_ctrl(1)
    while not seen:
        machine.device.work(0.01)
    assert seen == [(WriterStatus.WRITING, 0)]
    assert registers["writer_status"] == WriterStatus.STOPPED
    assert registers["writer_count"] > 0
    words = np.frombuffer(interrupted.data, np.uint64, 8 * 512, 8192).reshape(8, 512)
    assert (words == expected_pages(8, registers["writer_count"])[:, np.newaxis]).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("buffer", 100),
        ("buffer", (1 << 64) - 4096),
        ("length", 0),
        ("length", 5000),
        ("rate", 0),
        ("rate", 1 << 50),
    ],
)
def test_the_writer_refuses_what_makes_no_sense(machine: Machine, name: str, value: int) -> None:
    registers = machine.device.registers
    good = {"buffer": 4096, "length": 8192, "rate": 4096}
    for key, number in (good | {name: value}).items():
        registers[f"writer_{key}"] = number
    machine.device.writer.write_ctrl(1)
    assert registers["writer_status"] == WriterStatus.BAD_BUFFER
    assert machine.device.work_due() is None


@pytest.mark.parametrize("state", [S.RUNNING_P2P, S.STOP])
def test_a_reset_raises_nothing_that_was_pending(state: S) -> None:
    """A device that is reset while it is quiet runs again, and has forgotten what waited for that."""
    machine = Machine()
    machine.device.migration.set_state(S.RUNNING_P2P)
    machine.raise_irq(3)
    machine.device.migration.set_state(state)
    assert machine.device.interrupts.pending == [3]
    machine.device.reset(S.RUNNING, "reset")
    assert machine.device.interrupts.pending == []
    assert machine.raised == []
