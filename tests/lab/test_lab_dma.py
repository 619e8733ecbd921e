"""DMA while a real QEMU migrates the device: guest memory holds what the device wrote."""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from labkit import MIB, until
from qtestkit import Registers, migrate, moving

from vfu_dev.device.reference.layout import DESCRIPTOR, Op, Status, WriterStatus
from vfu_dev.device.reference.writer import expected_pages
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# In guest memory, of which the guest without a CPU uses nothing.
TABLE, BUFFERS, BUFFER_BYTES = 8 * MIB, 16 * MIB, 2 * MIB


async def start_writer(registers: Registers, buffer: int, rate: int) -> None:
    """Start the writer and wait until it has been round its buffer once."""
    await registers.set(writer_buffer=buffer, writer_length=BUFFER_BYTES, writer_rate=rate, writer_ctrl=1)
    await until(lambda: more_stamps(registers, BUFFER_BYTES // 4096), "once round the buffer")


async def more_stamps(registers: Registers, than: int) -> bool:
    return await registers.get("writer_count") > than


async def stopped(registers: Registers) -> bool:
    return await registers.get("writer_status") != WriterStatus.WRITING


async def wrong_bytes(registers: Registers, buffer: int) -> int:
    """Stop the writer and count what is not as its own count says."""
    await registers.set(writer_ctrl=0)
    await until(lambda: stopped(registers), "the writer has stopped")
    stamps = await registers.get("writer_count")
    assert registers.guest.client is not None
    data = await registers.guest.client.read_block(buffer, BUFFER_BYTES)
    pages = BUFFER_BYTES // 4096
    words = np.frombuffer(data, np.uint64).reshape(pages, 512)
    return int(np.count_nonzero(words != expected_pages(pages, stamps)[:, np.newaxis])) * 8


async def twice_written(lab: Lab, devices: list[Registers]) -> None:
    """Wait until every page of every buffer was sent, and then was written once more."""

    def second_pass(row: dict[str, Any]) -> bool:
        return int(row["qemu"].get("ram", {}).get("dirty-sync-count", 0)) > 1

    await lab.wait_for(second_pass, "the second pass over guest memory")
    for registers in devices:
        stamps = await registers.get("writer_count") + BUFFER_BYTES // 4096
        await until(lambda r=registers, n=stamps: more_stamps(r, n), "once more round the buffer")  # type: ignore[misc]


async def writer_migrates(lab: Lab, *, logged: bool = True) -> list[int]:
    """Migrate under the writers of all devices; returns the wrong bytes in each buffer."""
    devices = [Registers(lab, index) for index in range(lab.options.devices)]
    buffers = [BUFFERS + 2 * BUFFER_BYTES * index for index in range(len(devices))]
    for server in lab.source.servers:
        await server.command("dma-log", enabled=logged)
    for registers, buffer in zip(devices, buffers, strict=True):
        await start_writer(registers, buffer, 8 * MIB)
    await migrate(lab, lambda: twice_written(lab, devices))
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


# 10 ms for each of a transfer's more than 10,000 reads: at the source it would take more than 100 s, so that
# it is not over before a lab that has to wait for a processor has moved the VM. A request waits for one read.
SLOW_READS = "op=dma-read,delay=0.01"


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

    in_lab(replace(moving(options), faults_source=(SLOW_READS,)), scenario)


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
        # Each look is a request that may cross DMA by message.
        await until(lambda: idle(first), "the descriptor's status")
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
