"""The reference device: its register map, its memory, and what it refuses."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from vfu_dev.device import Device, Field, PciIdentity, Region, Registers
from vfu_dev.device.base import RefusedAccessError
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.errors import ConfigError
from vfu_dev.testing import InMemoryBus
from vfu_dev.uapi import DeviceState as S
from vfu_dev.workload.splitmix import fill_words


@pytest.fixture
def device() -> Iterator[ReferenceDevice]:
    made = ReferenceDevice("test", memory_bytes=5 * 4096, fill_seed=42)
    yield made
    made.close()


class Bus:
    """Accesses as the library makes them."""

    def __init__(self, device: Device) -> None:
        self.handlers = {bar.index: device.region_handler(bar) for bar in device.bars}

    def read(self, bar: int, offset: int, count: int) -> bytes:
        """Read from a BAR."""
        buffer = bytearray(count)
        self.handlers[bar](memoryview(buffer), offset, False)
        return bytes(buffer)

    def write(self, bar: int, offset: int, data: bytes) -> None:
        """Write to a BAR."""
        self.handlers[bar](memoryview(bytearray(data)), offset, True)

    def u32(self, offset: int) -> int:
        """Read a 32-bit register."""
        return int(struct.unpack("<I", self.read(0, offset, 4))[0])

    def u64(self, offset: int) -> int:
        """Read a 64-bit register."""
        return int(struct.unpack("<Q", self.read(0, offset, 8))[0])


def splitmix64(seed: int, index: int) -> int:
    """The definition, in plain integers."""
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def test_fill_is_splitmix64_across_chunks() -> None:
    words = np.empty(70_001, dtype=np.uint64)
    seed = 0xFEDC_BA98_7654_3210
    fill_words(words, seed)
    for index in (0, 1, 32_767, 32_768, 65_536, 70_000):
        assert int(words[index]) == splitmix64(seed, index)


def test_registers_say_what_the_device_is(device: ReferenceDevice) -> None:
    bus = Bus(device)
    assert bus.read(0, 0, 4) == b"VFUD"
    assert (bus.u32(4), bus.u64(8), bus.u64(0x10)) == (1, 5 * 4096, 42)
    assert (bus.u32(0x1C), bus.u32(0x30)) == (1, 4096)
    assert bus.read(2, 8, 8) == splitmix64(42, 1).to_bytes(8, "little")


def test_read_only_registers_and_gaps_drop_writes(device: ReferenceDevice) -> None:
    bus = Bus(device)
    before = bus.read(0, 0, 0x100)
    bus.write(0, 0x00, b"\xff" * 0x18)
    bus.write(0, 0x24, b"\xff" * 0x10)
    bus.write(0, 0x48, b"\xff" * 0x38)
    bus.write(0, 0xE8, b"\xff" * 0x18)
    assert bus.read(0, 0, 0x100) == before


def test_scratch_takes_any_size_and_alignment(device: ReferenceDevice) -> None:
    bus = Bus(device)
    bus.write(0, 0x101, b"abcde")
    bus.write(0, 0xFE, b"1234")
    assert bus.read(0, 0x100, 8) == b"34bcde\0\0"
    bus.write(0, 0x1FE, b"1234")  # its last two bytes, and the first two of the register after it
    assert bus.read(0, 0x1FC, 8) == b"\0\x001234\0\0"


def test_irq_raise_counts_and_triggers_vectors_that_exist(device: ReferenceDevice) -> None:
    machine = InMemoryBus()
    device.attach(machine)
    bus = Bus(device)
    for vector in (0, 3, 4, 0xFFFFFFFF):
        bus.write(0, 0x20, struct.pack("<I", vector))
    assert machine.irqs == [0, 3]
    assert bus.u32(0x24) == device.counters.irqs == 2
    assert bus.u32(0x20) == 0


def test_soft_reset_clears_registers_and_keeps_memory(device: ReferenceDevice) -> None:
    bus = Bus(device)
    bus.write(0, 0x100, b"x")
    bus.write(2, 0, b"y")
    bus.write(0, 0x20, bytes(4))
    bus.write(0, 0x18, b"\1\0\0\0")
    assert (bus.u32(0x18), bus.u32(0x24), bus.read(0, 0x100, 1)) == (0, 0, b"\0")
    assert (bus.read(0, 0, 4), bus.read(2, 0, 1)) == (b"VFUD", b"y")


def test_beyond_the_memory_the_bar_reads_ones(device: ReferenceDevice) -> None:
    bus = Bus(device)
    end = 5 * 4096
    bus.write(2, end - 2, b"1234")
    assert bus.read(2, end - 2, 4) == b"12\xff\xff"
    bus.write(2, 8 * 4096 - 1, b"1")
    assert bus.read(2, 8 * 4096 - 1, 1) == b"\xff"


@pytest.mark.parametrize(("bar", "size"), [(0, 4096), (2, 8 * 4096), (4, 4096)])
def test_accesses_out_of_bounds_are_refused(device: ReferenceDevice, bar: int, size: int) -> None:
    bus = Bus(device)
    for offset, count in [(size, 1), (size - 1, 2), (1 << 63, 1), (0, size + 1), (-1, 1)]:
        for access in (lambda o, c: bus.read(bar, o, c), lambda o, c: bus.write(bar, o, bytes(c))):
            with pytest.raises(RefusedAccessError) as caught:
                access(offset, count)
            assert caught.value.errno == errno.EINVAL
    assert device.counters.refused_accesses == 10


def test_a_stopped_device_serves_reads_and_refuses_writes(device: ReferenceDevice) -> None:
    bus = Bus(device)
    for state in (S.STOP, S.STOP_COPY, S.STOP, S.RESUMING):
        device.migration.set_state(state)
        assert bus.read(0, 0, 4) == b"VFUD"
        with pytest.raises(RefusedAccessError, match=state.name) as caught:
            bus.write(0, 0x100, b"x")
        assert caught.value.errno == errno.EBUSY
    device.reset(S.RUNNING, "test")
    for state in (S.RUNNING, S.PRE_COPY, S.PRE_COPY_P2P, S.RUNNING_P2P):
        device.migration.set_state(state)
        bus.write(0, 0x100, b"x")


def test_a_migration_carries_memory_and_registers_and_counts_itself() -> None:
    source = ReferenceDevice("source", memory_bytes=1 << 20, fill_seed=3)
    target = ReferenceDevice("target", memory_bytes=1 << 20, fill_seed=4)
    bus = Bus(source)
    bus.write(0, 0x100, b"scratch")
    bus.write(0, 0x20, bytes(4))
    source.migration.set_state(S.STOP_COPY)
    target.migration.set_state(S.RESUMING)
    buffer = memoryview(bytearray(1 << 16))
    while stored := source.migration.read_into(buffer):
        target.migration.write(buffer[:stored])
    target.migration.set_state(S.RUNNING)
    moved = Bus(target)
    assert target.memory.data.tobytes() == source.memory.data.tobytes()
    assert moved.read(0, 0x100, 7) == b"scratch"
    assert (moved.u32(0x24), moved.u64(0x28), moved.u64(0x10)) == (1, 1, 4)


def test_an_abandoned_resume_leaves_nothing_unverified_behind() -> None:
    source = ReferenceDevice("source", memory_bytes=1 << 20, fill_seed=9)
    device = ReferenceDevice("test", memory_bytes=1 << 20, fill_seed=9)
    source.migration.set_state(S.STOP_COPY)
    buffer = memoryview(bytearray(300_000))
    device.migration.set_state(S.RESUMING)
    device.migration.write(buffer[: source.migration.read_into(buffer)])
    assert device.memory.data.any()
    device.reset(S.RUNNING, "connection lost")
    assert not device.memory.data.any()
    assert device.memory.memory.written_bytes == 0


def test_a_device_of_another_author_needs_its_registers_and_nothing_else() -> None:
    class Adder(Device):
        identity = PciIdentity(0x1234, 0x5678, 0xFF0000, 2)
        type_name = "adder"
        registers = Registers(
            0,
            [
                Field("add", 0, "<u8", "wo", "added to the sum"),
                Field("sum", 8, "<u8", "ro", "of all that was added", migrates=True),
            ],
        )
        notes = Region(2, size_bytes=8192)

        @registers.written("add")
        def add(self, value: int) -> None:
            self.registers["sum"] += value

    one, two = Adder(), Adder()
    Bus(one).write(0, 0, struct.pack("<Q", 40))
    Bus(one).write(0, 0, struct.pack("<Q", 2))
    one.migration.set_state(S.STOP_COPY)
    two.migration.set_state(S.RESUMING)
    buffer = memoryview(bytearray(1 << 16))
    two.migration.write(buffer[: one.migration.read_into(buffer)])
    two.migration.set_state(S.RUNNING)
    assert Bus(two).u64(8) == 42


def test_two_bars_cannot_share_an_index() -> None:
    class Twice(Device):
        one = Registers(0, [])
        other = Registers(0, [])

    with pytest.raises(ConfigError, match=r"Twice: one and other both need BAR0$"):
        Twice()
