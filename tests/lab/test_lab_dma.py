"""DMA and interrupts while a real QEMU migrates the device: guest memory holds what the device wrote."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from labkit import MIB, dirtying

from vfu_dev.device.dma import DESCRIPTOR, DMA_FIELDS, Op, Status
from vfu_dev.device.writer import WRITER_FIELDS, expected_pages
from vfu_dev.lab.migrate import Lab, MigrateOptions
from vfu_dev.lab.qtest import CONFIG_ADDRESS, CONFIG_DATA
from vfu_dev.lab.qtest_guest import PCI_BASE_ADDRESS_0, QtestGuest

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

OFFSETS = {field.name: (field.offset, int(field.format[-1])) for field in (*DMA_FIELDS, *WRITER_FIELDS)}
IRQ_RAISE = 0x20
# In guest memory, of which the guest without a CPU uses nothing.
TABLE, BUFFERS, BUFFER_BYTES = 8 * MIB, 16 * MIB, 2 * MIB
MESSAGES = 12 * MIB  # where MSI-X writes to, instead of an APIC


def moving(options: Options, devices: int = 1) -> MigrateOptions:
    """Return options under which guest memory is sent while the device writes to it, and still converges."""
    return options(
        devices=devices,
        load=dirtying(0),
        max_bandwidth=64 * MIB,
        switchover_bandwidth=64 * MIB,
        downtime_limit_ms=300,
        warmup_seconds=0.0,
    )


class Registers:
    """The registers of one device of the lab's guest, wherever the guest is now."""

    def __init__(self, lab: Lab, index: int = 0) -> None:
        assert isinstance(lab.guest, QtestGuest)
        self.guest = lab.guest
        self.device = lab.guest.devices[index]

    async def get(self, name: str) -> int:
        """Read a register."""
        offset, width = OFFSETS[name]
        assert self.guest.client is not None
        return await self.guest.client.read(width, self.device.bar0 + offset)

    async def set(self, **values: int) -> None:
        """Write registers, in the order given."""
        assert self.guest.client is not None
        for name, value in values.items():
            offset, width = OFFSETS[name]
            await self.guest.client.write(width, self.device.bar0 + offset, value)

    async def config(self, offset: int) -> int:
        """Read a word of configuration space."""
        assert self.guest.client is not None
        return await self.guest.client.config_read(self.device.slot, offset)


async def until(condition: Callable[[], Coroutine[Any, Any, bool]], what: str) -> None:
    """Wait for a condition that is asked for every few milliseconds."""
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.005)


async def start_writer(registers: Registers, buffer: int, rate: int) -> None:
    """Start the writer and wait until it has been round its buffer once."""
    await registers.set(writer_buffer=buffer, writer_length=BUFFER_BYTES, writer_rate=rate, writer_ctrl=1)
    await until(lambda: more_stamps(registers, BUFFER_BYTES // 4096), "once round the buffer")


async def more_stamps(registers: Registers, than: int) -> bool:
    return await registers.get("writer_count") > than


async def migrate(lab: Lab) -> None:
    """Move the VM; the guest follows."""
    await lab.configure()
    await lab.begin(await lab.listen())
    row = await lab.wait_final()
    assert row["status"] == "completed", row
    await lab.wait_running(lab.destination.qemu)
    await lab.guest.follow(lab.destination.qemu)


async def wrong_bytes(registers: Registers, buffer: int) -> int:
    """Stop the writer and count what is not as its own count says."""
    await registers.set(writer_ctrl=0)
    stamps = await registers.get("writer_count")
    assert registers.guest.client is not None
    data = await registers.guest.client.read_block(buffer, BUFFER_BYTES)
    pages = BUFFER_BYTES // 4096
    words = np.frombuffer(data, np.uint64).reshape(pages, 512)
    return int(np.count_nonzero(words != expected_pages(pages, stamps)[:, np.newaxis])) * 8


async def writer_migrates(lab: Lab, *, logged: bool = True) -> list[int]:
    """Migrate under the writers of all devices; returns the wrong bytes in each buffer."""
    devices = [Registers(lab, index) for index in range(lab.options.devices)]
    buffers = [BUFFERS + 2 * BUFFER_BYTES * index for index in range(len(devices))]
    for server in lab.source.servers:
        await server.command("dma-log", enabled=logged)
    for registers, buffer in zip(devices, buffers, strict=True):
        await start_writer(registers, buffer, 8 * MIB)
    await migrate(lab)
    for registers in devices:
        stamps = await registers.get("writer_count")
        await until(lambda r=registers, n=stamps: more_stamps(r, n + 10), "the writer goes on")  # type: ignore[misc]
    return [await wrong_bytes(*pair) for pair in zip(devices, buffers, strict=True)]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_what_devices_write_while_they_move_arrives(options: Options, in_lab: InLab, devices: int) -> None:
    """Each of them writes all the time, here and there; no stamp is lost, none is made twice."""
    assert in_lab(moving(options, devices), writer_migrates) == [0] * devices


def test_without_dirty_logging_the_same_check_fails(options: Options, in_lab: InLab) -> None:
    """QEMU cannot know what the device wrote after it had sent that page."""
    (wrong,) = in_lab(moving(options), lambda lab: writer_migrates(lab, logged=False))
    assert wrong > 0


def test_a_transfer_under_way_is_completed_on_the_other_side(options: Options, in_lab: InLab) -> None:
    """Gigabytes in flight when the VM moves: every descriptor is done, exactly once."""

    async def scenario(lab: Lab) -> None:
        registers = Registers(lab)
        client = registers.guest.client
        assert client is not None
        count, size = 4096, MIB
        rows = np.zeros(count, dtype=DESCRIPTOR)
        rows["op"], rows["address"], rows["length"] = Op.CHECKSUM_GUEST, BUFFERS, size
        rows["op"][::8], rows["value"][::8] = Op.FILL_DEVICE, 0x1234
        await client.write_block(TABLE, rows.tobytes())
        await registers.set(dma_table=TABLE, dma_count=count, dma_ctrl=1)
        await until(lambda: done_more_than(registers, 0), "the first descriptor")
        await migrate(lab)
        done = await registers.get("dma_done")
        assert done > 0
        client = registers.guest.client
        assert client is not None
        await until(lambda: idle(registers), "the last descriptor")
        assert await registers.get("dma_done") == count
        raw = await client.read_block(TABLE, rows.nbytes)
        found = np.frombuffer(raw, DESCRIPTOR)
        assert set(found["status"].tolist()) == {Status.DONE}
        assert len(set(found["result"][1::8].tolist())) == 1
        assert struct.unpack("<Q", await client.read_block(registers.device.bar2 + 800, 8))[0] == 0x1234
        moved = await lab.destination.servers[0].status()
        assert moved["counters"]["dma_read_bytes"] > 0, "it was over before it moved"

    in_lab(moving(options), scenario)


async def done_more_than(registers: Registers, count: int) -> bool:
    return await registers.get("dma_done") > count


async def idle(registers: Registers) -> bool:
    return await registers.get("dma_status") == Status.IDLE


def test_descriptors_meet_the_memory_of_a_real_machine(options: Options, in_lab: InLab) -> None:
    """RAM, RAM in two regions, the firmware's ROM, a hole, this device's own BAR."""

    async def scenario(lab: Lab) -> list[Status]:
        registers = Registers(lab)
        client = registers.guest.client
        assert client is not None
        rows = np.zeros(6, dtype=DESCRIPTOR)
        rows["length"] = 4096
        rows["op"] = [Op.TO_GUEST, Op.TO_DEVICE, Op.FILL_GUEST, Op.FILL_GUEST, Op.FILL_GUEST, Op.FILL_GUEST]
        rows["address"] = [BUFFERS, BUFFERS, 0xFFFF_F000, 0xD000_0000, registers.device.bar0, 0x1_0000_0000]
        rows["offset"][1] = 8192
        await client.write_block(TABLE, rows.tobytes())
        await registers.set(dma_table=TABLE, dma_count=len(rows), dma_ctrl=1)
        await until(lambda: idle(registers), "the last descriptor")
        expected = await client.read_block(registers.device.bar2, 4096)
        assert await client.read_block(BUFFERS, 4096) == expected
        assert await client.read_block(registers.device.bar2 + 8192, 4096) == expected
        found = np.frombuffer(await client.read_block(TABLE, rows.nbytes), DESCRIPTOR)
        return [Status(value) for value in found["status"].tolist()]

    statuses = in_lab(moving(options), scenario)
    assert statuses[:2] == [Status.DONE] * 2
    assert statuses[2] in (Status.FORBIDDEN, Status.UNMAPPED)
    assert set(statuses[3:]) == {Status.UNMAPPED}


def test_one_device_writes_to_another_before_and_after_they_move(options: Options, in_lab: InLab) -> None:
    """Peer to peer, by DMA_WRITE through QEMU: the first device fills the second's mapped memory."""

    async def fill(first: Registers, second: Registers, page: int) -> None:
        client = first.guest.client
        assert client is not None
        row = np.zeros(1, dtype=DESCRIPTOR)
        row["op"], row["address"] = Op.FILL_GUEST, second.device.bar2 + 4096 * page
        row["length"], row["value"] = 4096, 0x1000 + page
        await client.write_block(TABLE, row.tobytes())
        await first.set(dma_table=TABLE, dma_count=1, dma_ctrl=1)

        # In memory, not in a register: a request must not cross DMA by message.
        async def done() -> bool:
            raw = await client.read_block(TABLE, row.nbytes)
            return bool(np.frombuffer(raw, DESCRIPTOR)["status"][0])

        await until(done, "the descriptor's status")
        assert np.frombuffer(await client.read_block(TABLE, row.nbytes), DESCRIPTOR)["status"] == Status.DONE

    async def pages(second: Registers) -> list[int]:
        client = second.guest.client
        assert client is not None
        found = []
        for page in (1, 2):
            data = await client.read_block(second.device.bar2 + 4096 * page, 4096)
            assert data == data[:8] * 512
            found.append(int.from_bytes(data[:8], "little"))
        return found

    async def scenario(lab: Lab) -> None:
        first, second = Registers(lab, 0), Registers(lab, 1)
        await fill(first, second, 1)
        await migrate(lab)
        await fill(first, second, 2)
        assert await pages(second) == [0x1001, 0x1002]

    chosen = replace(moving(options, 2), server_extra=("--access", "mmap"), fill=0)
    in_lab(chosen, scenario)


# --- interrupts ---------------------------------------------------------------------------------------------

CAPABILITIES, MSIX_CAPABILITY = 0x34, 0x11
ENTRY_BYTES, MASKED = 16, 1


async def set_up_msix(registers: Registers, vectors: int) -> int:
    """Have each vector write its number + 1 to a word of RAM; returns the table's address."""
    client = registers.guest.client
    assert client is not None
    table = await registers.config(PCI_BASE_ADDRESS_0 + 16) & ~0xF
    capability = await registers.config(CAPABILITIES) & 0xFF
    while (word := await registers.config(capability)) & 0xFF != MSIX_CAPABILITY:
        capability = word >> 8 & 0xFF
    # The upper half alone: the lower one, the capability's id, may not be written.
    select = f"outl {CONFIG_ADDRESS:#x} {0x80000000 | registers.device.slot << 11 | capability:#x}"
    await client.batch([select, f"outw {CONFIG_DATA + 2:#x} {word >> 16 | 1 << 15:#x}"])
    for vector in range(vectors):
        entry = table + ENTRY_BYTES * vector
        for offset, value in ((0, MESSAGES + 4 * vector), (4, 0), (8, vector + 1), (12, 0)):
            await client.write(4, entry + offset, value)
    return table


async def messages(registers: Registers) -> list[int]:
    """Return which vectors' messages are in RAM."""
    assert registers.guest.client is not None
    words = struct.unpack("<4I", await registers.guest.client.read_block(MESSAGES, 16))
    return [word - 1 for word in words if word]


@pytest.mark.parametrize("masked", [2, 3])
def test_masked_and_pending_interrupts_survive(options: Options, in_lab: InLab, masked: int) -> None:
    """One delivered before, one masked and pending while it moves: unmasked there, it is delivered there.

    QEMU keeps masks and what is pending behind them, but asks the server when the guest reads the PBA, so
    that a guest cannot see it there (vfio_user_pba_read); the message tells. A masked vector below others is
    what a destination without the last patch of our series dies of.
    """

    async def scenario(lab: Lab) -> None:
        registers = Registers(lab)
        client = registers.guest.client
        assert client is not None
        table = await set_up_msix(registers, 4)
        await client.write(4, table + ENTRY_BYTES * masked + 12, MASKED)
        for vector in (masked, 1):
            await client.write(4, registers.device.bar0 + IRQ_RAISE, vector)
        await until(lambda: are(registers, [1]), "vector 1 delivered, the masked one not")
        await client.write(4, MESSAGES + 4, 0)
        await migrate(lab)
        moved = registers.guest.client
        assert moved is not None
        assert await messages(registers) == []
        await moved.write(4, table + ENTRY_BYTES * masked + 12, 0)
        assert await messages(registers) == [masked]
        await moved.write(4, MESSAGES + 4 * masked, 0)
        await moved.write(4, registers.device.bar0 + IRQ_RAISE, 0)
        await until(lambda: are(registers, [0]), "a new interrupt on the destination")
        for side in (lab.source, lab.destination):
            assert (await side.servers[0].status())["counters"]["irq_errors"] == 0

    in_lab(moving(options), scenario)


async def are(registers: Registers, vectors: list[int]) -> bool:
    return await messages(registers) == vectors
