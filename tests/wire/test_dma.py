"""The DMA engine over the wire: real server, real library, guest memory in memfds of the client's."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from dmakit import KIB, MIB, OFFSETS, Driver, Outcome, carry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serverkit import RunningServer, ServerFactory, readable, server_farm, short_folder, wait_until

from vfu_dev import uapi
from vfu_dev.client import ClientCommandError, VfioUserDevice, messages
from vfu_dev.client.frames import Buffer, Call
from vfu_dev.client.messages import REGION_ACCESS
from vfu_dev.device.reference.dma import SLICE_BYTES
from vfu_dev.device.reference.layout import CTRL_ABORT, CTRL_START, FLAG_INTERRUPT, Op, Status
from vfu_dev.uapi import VFIO_PCI_BAR0_REGION_INDEX as BAR0
from vfu_dev.uapi import VFIO_PCI_BAR2_REGION_INDEX as BAR2
from vfu_dev.uapi import VFIO_PCI_CONFIG_REGION_INDEX as CONFIG
from vfu_dev.uapi import VFIO_PCI_MSIX_IRQ_INDEX as MSIX

RAM = 0x100000  # what the transfers are about; the table lies in a region of its own below
READ, WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE
TOP = (1 << 64) - 1


@pytest.fixture
def driver(device: VfioUserDevice) -> Driver:
    """Return a driver with 64 KiB for tables and 1 MiB of guest memory."""
    device.dma_map(0x10000, 64 * KIB)
    device.dma_map(RAM, MIB)
    return Driver(device)


def counters(server: RunningServer) -> dict[str, int]:
    return server.status()["counters"]  # type: ignore[no-any-return]


def test_copies_both_ways_and_checksums(driver: Driver, server: RunningServer) -> None:
    """What goes into device memory comes out of it; any alignment, more than a slice."""
    data = random.Random(1).randbytes(SLICE_BYTES + 12345)
    driver.memory(RAM + 3, len(data))[:] = data
    there = driver.one(Op.TO_DEVICE, address=RAM + 3, offset=77, length=len(data))
    assert (there.status, there.result) == (Status.DONE, len(data))
    assert driver.device.region_read(BAR2, 77, len(data)) == data
    driver.memory(RAM + 3, len(data))[:] = bytes(len(data))
    back, guest, own = driver.run(
        {"op": Op.TO_GUEST, "address": RAM + 1000, "offset": 77, "length": len(data)},
        {"op": Op.CHECKSUM_GUEST, "address": RAM + 1000, "length": len(data)},
        {"op": Op.CHECKSUM_DEVICE, "offset": 77, "length": len(data)},
    )
    assert [one.status for one in (back, guest, own)] == [Status.DONE] * 3
    assert bytes(driver.memory(RAM + 1000, len(data))) == data
    assert guest.result == own.result == zlib.crc32(data)
    seen = counters(server)
    # Two reads of the data and one descriptor each; writing back a status is no data.
    assert (seen["dma_read_bytes"], seen["dma_written_bytes"]) == (2 * len(data), len(data))
    assert seen["dma_errors"] == 0
    assert driver["dma_done"] == 4


def test_fills_repeat_the_value_over_slices(driver: Driver) -> None:
    length = SLICE_BYTES + 8 * 1000 + 5
    value = 0x0102030405060708
    done = driver.run(
        {"op": Op.FILL_GUEST, "address": RAM, "length": length, "value": value},
        {"op": Op.FILL_DEVICE, "offset": 4096, "length": length, "value": value},
    )
    assert [one.status for one in done] == [Status.DONE] * 2
    expected = (value.to_bytes(8, "little") * (length // 8 + 1))[:length]
    assert bytes(driver.memory(RAM, length)) == expected
    assert driver.device.region_read(BAR2, 4096, length) == expected
    assert bytes(driver.memory(RAM + length, 16)) == bytes(16)


def test_one_transfer_scatters_over_many_regions(driver: Driver) -> None:
    """Neighbouring regions of odd sizes, some without a file, are one stretch of memory to the device."""
    base, sizes = 0x400000, [4 * KIB, 12 * KIB, 4 * KIB, 300 * KIB, 4 * KIB, 64 * KIB]
    data = random.Random(2).randbytes(sum(sizes))
    at = base
    for number, size in enumerate(sizes):
        region = driver.device.dma_map(at, size, shared=number % 2 == 0)
        region.memory[:] = data[at - base : at - base + size]
        at += size
    done = driver.run(
        {"op": Op.TO_DEVICE, "address": base, "length": len(data)},
        {"op": Op.FILL_GUEST, "address": base + 100, "length": len(data) - 100},
    )
    assert [one.status for one in done] == [Status.DONE] * 2
    assert driver.device.region_read(BAR2, 0, len(data)) == data
    assert bytes(driver.memory(base, 100)) == data[:100]
    for region in list(driver.device.dma.regions.values())[2:]:
        assert not any(region.memory[100:])
    assert driver.device.dma.read_requests > 0
    assert driver.device.dma.write_requests > 0


def test_the_engine_gives_way_to_a_request_that_waits(driver: Driver, server: RunningServer) -> None:
    """A read that came with the start of 1000 descriptors is answered when one of them is done."""
    driver.put(*[{"op": Op.FILL_DEVICE, "length": 8}] * 1000)
    driver["dma_table"], driver["dma_count"] = driver.table, 1000
    connection, (ctrl, _), (done, _) = driver.device.connection, OFFSETS["dma_ctrl"], OFFSETS["dma_done"]
    start = REGION_ACCESS.pack(ctrl, BAR0, 4) + struct.pack("<I", CTRL_START)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        connection.post(uapi.VFIO_USER_REGION_WRITE, start)
        call = connection.submit(
            uapi.VFIO_USER_REGION_READ, REGION_ACCESS.pack(done, BAR0, 4), reply_bytes=64
        )
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    body = bytes(connection.wait(call).payload)
    assert int.from_bytes(body[REGION_ACCESS.size :], "little") <= 1
    assert driver.finish() is Status.IDLE
    assert driver["dma_done"] == 1000


def test_requests_cross_every_transfer_by_message(driver: Driver) -> None:
    """Before each reply to the server the client asks something itself: all is answered, in its order."""
    device, size = driver.device, 2 * SLICE_BYTES
    base = 0x400000
    region = device.dma_map(base, size, shared=False)
    region.memory[:] = data = random.Random(3).randbytes(size)
    calls: list[tuple[int, Call]] = []
    connection, answer = device.connection, device.dma.handle
    read = REGION_ACCESS.pack(0x20 + 4, BAR0, 4)  # irq_count: served in the middle of the transfer
    state = struct.pack("<II", 16, uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE)

    def cross(command: int, payload: memoryview) -> tuple[Buffer, ...]:
        for request, body in (
            (uapi.VFIO_USER_REGION_READ, read),
            (uapi.VFIO_USER_DEVICE_FEATURE, state),
            (uapi.VFIO_USER_REGION_READ, read),
        ):
            calls.append((request, connection.submit(request, body, reply_bytes=64)))
        return answer(command, payload)

    driver.put(
        {"op": Op.TO_DEVICE, "address": base, "length": size},
        {"op": Op.CHECKSUM_GUEST, "address": base, "length": size},
        {"op": Op.FILL_GUEST, "address": base, "length": size, "value": 0x55},
    )
    connection.handler = cross
    driver.start(3)
    assert driver.finish() is Status.IDLE
    connection.handler = answer
    assert [one.status for one in driver.outcomes(3)] == [Status.DONE] * 3
    assert driver.outcomes(3)[1].result == zlib.crc32(data)
    assert device.region_read(BAR2, 0, size) == data
    assert bytes(region.memory) == (0x55).to_bytes(8, "little") * (size // 8)
    assert len(calls) == 3 * 6
    for request, call in calls:
        body = bytes(connection.wait(call).payload)
        assert len(body) == (20 if request == uapi.VFIO_USER_REGION_READ else 16)


def test_the_device_moves_in_the_middle_of_a_transfer_by_message(driver: Driver) -> None:
    """STOP crosses it: it waits for the transfer, and the device then is stopped between two slices."""
    device, slices = driver.device, 64
    size = slices * SLICE_BYTES
    base = 0x400000
    device.dma_map(base, size, shared=False)
    calls: list[Call] = []
    connection, answer = device.connection, device.dma.handle
    set_state = uapi.VFIO_DEVICE_FEATURE_SET | uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
    stop = struct.pack("<IIIi", 16, set_state, uapi.DeviceState.STOP, -1)

    def cross(command: int, payload: memoryview) -> tuple[Buffer, ...]:
        if not calls:
            calls.append(connection.submit(uapi.VFIO_USER_DEVICE_FEATURE, stop, reply_bytes=64))
        return answer(command, payload)

    connection.handler = cross
    driver.put({"op": Op.FILL_GUEST, "address": base, "length": size, "value": 0x66})
    driver.start(1)
    # The server's requests are taken while we wait for its replies.
    wait_until(lambda: driver["dma_status"] == Status.BUSY and calls, "the first message")
    connection.wait(calls[0])
    assert device.migration.get_state() is uapi.DeviceState.STOP
    written = device.dma.write_requests
    for _ in range(50):
        assert driver["dma_status"] == Status.BUSY
    assert device.dma.write_requests == written < slices
    device.migration.set_state(uapi.DeviceState.RUNNING)
    assert driver.finish() is Status.IDLE
    assert driver.outcomes(1)[0].status is Status.DONE
    assert set(device.dma.regions[base].memory[::8]) == {0x66}


def test_bus_mastering_is_taken_away_in_the_middle_of_a_transfer_by_message(driver: Driver) -> None:
    """The write to configuration space crosses it: it waits for a slice, which is the last one."""
    device, slices = driver.device, 64
    base, size = 0x400000, slices * SLICE_BYTES
    device.dma_map(base, size, shared=False)
    calls: list[Call] = []
    connection, answer = device.connection, device.dma.handle
    # <linux/pci_regs.h>: PCI_COMMAND, with PCI_COMMAND_MEMORY alone
    command = REGION_ACCESS.pack(0x04, CONFIG, 2) + struct.pack("<H", 0x2)

    def cross(number: int, payload: memoryview) -> tuple[Buffer, ...]:
        if not calls:
            calls.append(connection.submit(uapi.VFIO_USER_REGION_WRITE, command, reply_bytes=64))
        return answer(number, payload)

    connection.handler = cross
    driver.put({"op": Op.FILL_GUEST, "address": base, "length": size, "value": TOP})
    driver.start(1)
    assert driver.finish() is Status.NO_BUS_MASTER
    connection.wait(calls[0])
    assert 0 < device.dma.write_requests < slices
    assert driver.outcomes(1)[0].status is Status.IDLE


def in_registers(driver: Driver, **fields: int) -> Outcome:
    """Carry out one descriptor in registers."""
    for name, value in ({"flags": 0, "vector": 0} | fields).items():
        driver[f"desc_{name}"] = value
    driver["desc_ctrl"] = CTRL_START
    ended = driver.finish()
    outcome = Outcome(Status(driver["desc_status"]), driver["desc_result"])
    assert ended is Status.IDLE or ended is outcome.status
    return outcome


def test_a_descriptor_in_registers_is_carried_out_like_one_in_memory(driver: Driver) -> None:
    """Every operation, over more than a slice, with its interrupt; nothing of it is in guest memory."""
    length = SLICE_BYTES + 777
    data = random.Random(4).randbytes(length)
    driver.memory(RAM, length)[:] = data
    eventfds = driver.device.enable_irqs(MSIX, 4)
    there = in_registers(
        driver, op=Op.TO_DEVICE, address=RAM, offset=5, length=length, flags=FLAG_INTERRUPT, vector=3
    )
    assert there == Outcome(Status.DONE, length)
    assert readable(eventfds) == [eventfds[3]]
    for fd in eventfds:
        os.close(fd)
    assert driver.device.region_read(BAR2, 5, length) == data
    checksum = Outcome(Status.DONE, zlib.crc32(data))
    assert in_registers(driver, op=Op.CHECKSUM_DEVICE, offset=5, length=length) == checksum
    assert in_registers(driver, op=Op.CHECKSUM_GUEST, address=RAM, length=length) == checksum
    assert (
        in_registers(driver, op=Op.FILL_GUEST, address=RAM, length=length, value=0x77).status is Status.DONE
    )
    assert bytes(driver.memory(RAM, 16)) == (0x77).to_bytes(8, "little") * 2
    assert in_registers(driver, op=Op.FILL_DEVICE, offset=0, length=8, value=0x78).status is Status.DONE
    assert in_registers(driver, op=Op.TO_GUEST, address=RAM, offset=0, length=8).status is Status.DONE
    assert bytes(driver.memory(RAM, 16)) == b"\x78" + bytes(7) + b"\x77" + bytes(7)
    assert not any(driver.memory(driver.table, 64 * KIB))
    assert driver["dma_done"] == 6


def test_a_bad_descriptor_in_registers_gets_its_status(driver: Driver) -> None:
    assert in_registers(driver, op=99, length=8).status is Status.BAD_OP
    assert in_registers(driver, op=Op.TO_GUEST, address=0, offset=0, length=8).status is Status.UNMAPPED
    driver.set_command(2)
    refused = in_registers(driver, op=Op.TO_GUEST, address=RAM, offset=0, length=8)
    assert refused.status is Status.NO_BUS_MASTER
    driver.set_command(6)
    # In guest memory there would be something to overlap with; the table of an earlier run is none.
    assert driver.one(Op.FILL_DEVICE, length=8).status is Status.DONE
    assert in_registers(driver, op=Op.FILL_GUEST, address=driver.table, length=64).status is Status.DONE


def test_a_descriptor_in_registers_goes_on_at_the_destination(serve: ServerFactory) -> None:
    """Started in a quiet state: the destination carries out what the registers said at the doorbell."""
    with serve().connect() as source, serve().connect() as target:
        for device in (source, target):
            device.dma_map(RAM, MIB)
        here, there = Driver(source), Driver(target)
        source.migration.set_state(uapi.DeviceState.RUNNING_P2P)
        here["desc_op"], here["desc_address"], here["desc_length"] = Op.FILL_GUEST, RAM, MIB
        here["desc_value"] = 0x1234
        here["desc_ctrl"] = CTRL_START
        here["desc_value"] = 0x9999
        assert here["dma_status"] == Status.BUSY
        carry(source, target)
        assert there.finish() is Status.IDLE
        assert (Status(there["desc_status"]), there["desc_result"]) == (Status.DONE, MIB)
        assert bytes(there.memory(RAM, MIB)) == (0x1234).to_bytes(8, "little") * (MIB // 8)
        assert there["desc_value"] == 0x9999


def refusals() -> list[Any]:
    size = MIB  # of the device memory too
    cases: dict[str, tuple[dict[str, int], Status]] = {
        "no operation": ({"op": 0, "length": 8}, Status.BAD_OP),
        "an operation too many": ({"op": 7, "length": 8}, Status.BAD_OP),
        "a flag too many": ({"op": 1, "flags": 2, "address": RAM, "length": 8}, Status.BAD_OP),
        "nothing": ({"op": 1, "address": RAM}, Status.BAD_LENGTH),
        "everything": ({"op": 5, "address": 0, "length": TOP}, Status.BAD_LENGTH),
        "one byte beyond the device": (
            {"op": 2, "address": RAM, "length": size + 1},
            Status.BAD_DEVICE_RANGE,
        ),
        "an offset beyond it": ({"op": 4, "offset": size + 1, "length": 1}, Status.BAD_DEVICE_RANGE),
        "an offset that wraps": ({"op": 4, "offset": TOP, "length": 2}, Status.BAD_DEVICE_RANGE),
        "nowhere": ({"op": 1, "address": 0xDEAD0000, "length": 8}, Status.UNMAPPED),
        "one byte beyond a region": ({"op": 3, "address": RAM + 1, "length": MIB}, Status.UNMAPPED),
        "one byte before it": ({"op": 1, "address": RAM - 1, "length": 8}, Status.UNMAPPED),
        "the end of all addresses": ({"op": 3, "address": TOP, "length": 1}, Status.UNMAPPED),
        "an address that wraps": ({"op": 3, "address": TOP - 3, "length": 8}, Status.UNMAPPED),
        "the table": ({"op": 3, "address": 0x10000, "length": 8}, Status.OVERLAP),
        "a part of it": ({"op": 3, "address": 0x10030, "length": 4096}, Status.OVERLAP),
        "a vector too many": (
            {"op": 4, "flags": FLAG_INTERRUPT, "vector": 1 << 31, "length": 8},
            Status.BAD_VECTOR,
        ),
    }
    return [pytest.param(fields, status, id=name) for name, (fields, status) in cases.items()]


@pytest.mark.parametrize(("fields", "status"), refusals())
def test_nonsense_is_refused_in_the_descriptor(
    driver: Driver, server: RunningServer, fields: dict[str, int], status: Status
) -> None:
    """The status says why, nothing was touched, and the next descriptor is carried out."""
    before = driver.device.region_read(BAR2, 0, MIB)
    bad, good = driver.run(fields, {"op": Op.CHECKSUM_GUEST, "address": RAM, "length": 8})
    assert (bad.status, bad.result) == (status, 0)
    assert good.status is Status.DONE
    assert not any(driver.memory(RAM, MIB))
    assert driver.device.region_read(BAR2, 0, MIB) == before
    assert counters(server)["dma_errors"] == 1


def test_regions_of_one_direction(driver: Driver) -> None:
    driver.device.dma_map(0x800000, 4096, flags=READ)
    driver.device.dma_map(0x801000, 4096, flags=WRITE)
    done = driver.run(
        {"op": Op.FILL_GUEST, "address": 0x800000, "length": 8},
        {"op": Op.CHECKSUM_GUEST, "address": 0x801000, "length": 8},
        {"op": Op.CHECKSUM_GUEST, "address": 0x800000, "length": 4097},
        {"op": Op.CHECKSUM_GUEST, "address": 0x800000, "length": 4096},
        {"op": Op.FILL_GUEST, "address": 0x801000, "length": 4096},
    )
    assert [one.status for one in done] == [Status.FORBIDDEN] * 3 + [Status.DONE] * 2


@pytest.mark.parametrize(
    ("table", "count", "status"),
    [
        (0x10000, 0, Status.BAD_TABLE),
        (0x10000, 4097, Status.BAD_TABLE),
        (0x10020, 1, Status.BAD_TABLE),
        ((1 << 64) - 64, 2, Status.BAD_TABLE),
        ((1 << 64) - 64, 1, Status.TABLE_UNREACHABLE),
        (0xDEAD0000, 1, Status.TABLE_UNREACHABLE),
        (0x1FFC0, 2, Status.TABLE_UNREACHABLE),  # the first is there, the second is not
        (0x800000, 1, Status.TABLE_UNREACHABLE),  # it can be read, its status not be written
    ],
)
def test_a_bad_table_ends_the_run(driver: Driver, table: int, count: int, status: Status) -> None:
    driver.device.dma_map(0x800000, 4096, flags=READ)
    driver.start(count, table)
    assert driver.finish() is status
    assert driver.one(Op.FILL_DEVICE, length=8).status is Status.DONE


def test_without_bus_mastering_nothing_moves(driver: Driver) -> None:
    driver.set_command(0x2)
    driver.put({"op": Op.FILL_GUEST, "address": RAM, "length": 4096, "value": TOP})
    driver.start(1)
    assert driver.finish() is Status.NO_BUS_MASTER
    assert driver.outcomes(1)[0].status is Status.IDLE
    assert not any(driver.memory(RAM, 4096))
    driver.set_command(0x6)
    driver.start(1)
    assert driver.finish() is Status.IDLE
    assert driver.outcomes(1)[0].status is Status.DONE


def test_completion_by_interrupt_comes_after_the_status(driver: Driver) -> None:
    eventfds = driver.device.enable_irqs(MSIX, 4)
    try:
        driver.put(
            {"op": Op.FILL_GUEST, "address": RAM, "length": MIB, "flags": FLAG_INTERRUPT, "vector": 2},
            {"op": 99, "flags": FLAG_INTERRUPT, "vector": 3},
        )
        driver.start(2)
        waiting = {eventfds[2], eventfds[3]}
        while waiting:
            ready = readable(waiting)
            assert ready
            for fd in ready:
                assert driver.outcomes(2)[eventfds.index(fd) - 2].status is not Status.IDLE
                assert os.eventfd_read(fd) == 1
                waiting.discard(fd)
    finally:
        for fd in eventfds:
            os.close(fd)
    assert [one.status for one in driver.outcomes(2)] == [Status.DONE, Status.BAD_OP]


def test_a_long_transfer_leaves_room_for_mmio_and_can_be_aborted(serve: ServerFactory) -> None:
    """Registers answer while gigabytes are moved; a second start is dropped; an abort takes effect."""
    server = serve(memory="64M")
    with server.connect() as device:
        device.dma_map(0x10000, 512 * KIB)
        driver = Driver(device)
        fill = {"op": Op.FILL_DEVICE, "length": 64 * MIB, "value": 5}
        driver.put(*[fill] * 4096)  # as many as there can be: half a minute's work
        driver.start(4096)
        assert driver["dma_status"] == Status.BUSY
        for _ in range(50):
            assert driver["id"] == 0x44554656
        wait_until(lambda: driver["dma_done"] > 2, "a part is done")
        driver["dma_ctrl"] = 1
        # An access that waited for the transfer would find it done.
        assert driver["dma_status"] == Status.BUSY
        assert driver["dma_done"] < 4096
        driver["dma_ctrl"] = CTRL_ABORT
        assert driver.finish() is Status.ABORTED
        statuses = [one.status for one in driver.outcomes(4096)]
        done = statuses.count(Status.DONE)
        assert 0 <= done < 4096
        assert statuses[:done] == [Status.DONE] * done
        assert set(statuses[done:]) <= {Status.ABORTED, Status.IDLE}
        # A second start from the beginning would have counted from there.
        assert driver["dma_done"] == done + statuses.count(Status.ABORTED)


@pytest.mark.parametrize("how", ["device reset", "soft reset"])
def test_a_reset_ends_a_transfer_and_the_engine_works_again(serve: ServerFactory, how: str) -> None:
    server = serve(memory="64M")
    with server.connect() as device:
        device.dma_map(0x10000, 64 * KIB)
        driver = Driver(device)
        driver.put(*[{"op": Op.FILL_DEVICE, "length": 64 * MIB}] * 1024)
        driver.start(1024)
        if how == "device reset":
            device.reset()
        else:
            driver["ctrl"] = 1
        assert driver["dma_status"] == Status.IDLE
        assert (driver["dma_table"], driver["dma_done"]) == (0, 0)
        driver.set_command(0x6)
        assert driver.one(Op.FILL_DEVICE, length=8).status is Status.DONE


def test_guest_memory_may_go_away_in_the_middle(serve: ServerFactory) -> None:
    """Unmapped while it is written: an error status, and the server lives."""
    server = serve(memory="1M")
    with server.connect() as device:
        device.dma_map(0x10000, 512 * KIB)
        device.dma_map(RAM, MIB)
        device.dma_map(0x400000, 4 * KIB, shared=False)
        driver, connection, answer = Driver(device), device.connection, device.dma.handle
        unmap = messages.DMA_UNMAP.pack(messages.DMA_UNMAP.size, 0, RAM, MIB)
        calls: list[Call] = []

        def cross(command: int, payload: memoryview) -> tuple[Buffer, ...]:
            room = messages.DMA_UNMAP.size
            calls.append(connection.submit(uapi.VFIO_USER_DMA_UNMAP, unmap, reply_bytes=room))
            return answer(command, payload)

        # The second one goes by message: the engine waits for this client, and the request crosses it.
        connection.handler = cross
        fill = {"op": Op.FILL_GUEST, "address": RAM, "length": MIB}
        driver.put(fill, fill | {"address": 0x400000, "length": 4 * KIB}, *[fill] * 4094)
        driver.start(4096)
        assert driver.finish() is Status.IDLE
        (call,) = calls
        connection.wait(call)
        first, by_message, *others = (one.status for one in driver.outcomes(4096))
        assert first is Status.DONE
        # Given up where this process has no processor for a second, between its request and its answer.
        assert by_message in (Status.DONE, Status.FAILED)
        assert others[-1] is Status.UNMAPPED
        assert set(others) <= {Status.DONE, Status.UNMAPPED}


def test_a_lost_client_ends_a_transfer(serve: ServerFactory) -> None:
    """By message or by mapping: the device is there for the next client, idle."""
    server = serve(memory="1M")
    for shared in (True, False):
        with server.connect() as device:
            device.dma_map(0x10000, 512 * KIB)
            device.dma_map(RAM, MIB, shared=shared)
            driver = Driver(device)
            driver.put(*[{"op": Op.FILL_GUEST, "address": RAM, "length": MIB}] * 4096)
            driver.start(4096)
        with server.connect() as device:
            assert Driver(device)["dma_status"] == Status.IDLE


def test_device_memory_written_by_dma_migrates(driver: Driver) -> None:
    """Dirty tracking sees it: in PRE_COPY a filled page is dirty once more."""
    migration = driver.device.migration
    migration.set_state(uapi.DeviceState.PRE_COPY)
    while migration.read(1 << 20):
        pass
    assert migration.precopy_info().dirty_bytes == 0
    assert driver.one(Op.FILL_DEVICE, offset=8192, length=4096, value=3).status is Status.DONE
    assert migration.precopy_info().dirty_bytes >= 4096
    driver.memory(RAM, 1)[:] = b"x"
    assert driver.one(Op.TO_DEVICE, address=RAM, offset=4096 * 5 - 1, length=2).status is Status.DONE
    assert migration.precopy_info().dirty_bytes >= 3 * 4096


# --- dirty logging ------------------------------------------------------------------------------------------

WINDOW = 8 * MIB
TRANSFERS = st.lists(
    st.tuples(st.integers(0, WINDOW - 1), st.sampled_from([1, 7, 4096, 5000, 70_000, 2 * MIB])),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def logged(
    library: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, VfioUserDevice]]:
    """Yield one server and client for many examples, with 8 MiB of guest memory in three regions."""
    with short_folder() as folder, server_farm(library, folder) as factory:
        server = factory(memory="1M")
        with server.connect() as device:
            device.dma_map(0x10000, 64 * KIB)
            device.dma_map(1 << 32, 3 * MIB)
            device.dma_map((1 << 32) + 3 * MIB, 4 * KIB)
            device.dma_map((1 << 32) + 3 * MIB + 4 * KIB, 5 * MIB - 4 * KIB)
            yield server, device


def pages_of(transfers: list[tuple[int, int]], page: int) -> set[int]:
    return {
        number
        for start, length in transfers
        for number in range(start // page, (start + length - 1) // page + 1)
    }


def test_a_report_that_is_too_large_says_which_limit_it_is(
    device: VfioUserDevice, server: RunningServer
) -> None:
    """max_bitmap_size of VERSION is what is kept to: 32 GiB in pages of 4 KiB, and not a page more."""
    limit = device.version.capabilities["migration"]["max_bitmap_size"]
    most = limit * 8 * 4096
    device.migration.dma_logging_start([])
    assert len(device.migration.dma_logging_report(0, most)) == limit
    with pytest.raises(ClientCommandError, match="Invalid argument"):
        device.migration.dma_logging_report(0, most + 4096)
    assert f"report too large: {most + 4096:#x} bytes" in server.log()
    assert f"max_bitmap_size is {limit}" in server.log()


def test_logging_starts_with_the_kernels_structure(device: VfioUserDevice) -> None:
    """24 bytes, the last 8 of which are a pointer to ranges in another process: everything is logged."""
    device.dma_map(0x10000, 64 * KIB)
    device.dma_map(RAM, MIB)
    driver = Driver(device)
    control = messages.LOGGING_CONTROL.pack(4096, 3, 0) + struct.pack("<Q", 0x7FFF_1234_5000)
    answer = device.migration.set(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, control)
    assert answer == control
    device.migration.dma_logging_report(RAM, MIB)
    assert driver.one(Op.TO_GUEST, address=RAM + 7 * 4096, offset=0, length=64).status is Status.DONE
    assert int.from_bytes(device.migration.dma_logging_report(RAM, MIB), "little") == 1 << 7


def test_the_log_of_a_region_ends_with_the_region(device: VfioUserDevice) -> None:
    """A report after DMA_UNMAP succeeds and has no bit, so a client asks before; others keep theirs."""
    device.dma_map(0x10000, 64 * KIB)
    gone, kept = RAM + MIB, RAM
    device.dma_map(kept, MIB)
    region = device.dma_map(gone, MIB)
    driver = Driver(device)

    def write_both() -> None:
        for address in (kept, gone):
            assert driver.one(Op.TO_GUEST, address=address, offset=0, length=64).status is Status.DONE

    def pages(address: int) -> int:
        return int.from_bytes(device.migration.dma_logging_report(address, MIB), "little")

    device.migration.dma_logging_start([])
    write_both()
    assert (pages(kept), pages(gone)) == (1, 1)
    write_both()
    device.dma_unmap(region)
    assert (pages(gone), pages(kept)) == (0, 1)
    device.dma_map(gone, MIB)  # a region of that address that comes later has a log of its own
    assert pages(gone) == 0


@pytest.mark.parametrize("mode", [1 << 2, 1 << 3])
def test_access_modes_of_the_specification_are_taken(device: VfioUserDevice, mode: int) -> None:
    """With a file the device reaches the memory; without one it is EINVAL."""
    device.dma_map(0x10000, 64 * KIB)
    device.dma_map(RAM, MIB, flags=READ | WRITE | mode)
    driver = Driver(device)
    assert driver.one(Op.FILL_GUEST, address=RAM, length=8, value=0x5A).status is Status.DONE
    assert bytes(driver.memory(RAM, 8)) == (0x5A).to_bytes(8, "little")
    with pytest.raises(ClientCommandError) as refused:
        device.dma_map(2 * RAM, MIB, flags=READ | WRITE | mode, shared=False)
    assert refused.value.errno == errno.EINVAL


def reported(device: VfioUserDevice, page: int) -> set[int]:
    bitmap = int.from_bytes(device.migration.dma_logging_report(1 << 32, WINDOW, page), "little")
    return {number for number in range(WINDOW // page) if bitmap >> number & 1}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=st.lists(TRANSFERS, min_size=1, max_size=3), exponent=st.integers(12, 21))
def test_reports_are_exactly_what_was_written(
    logged: tuple[RunningServer, VfioUserDevice], rounds: list[list[tuple[int, int]]], exponent: int
) -> None:
    """Between two reports: the pages of what the device wrote, no more, no less, at 4 KiB to 2 MiB.

    The log itself is kept at 4 KiB. A coarser one counts its pages from the start of each region, so that it
    would report more at the edge of a region that does not begin at such a page.
    """
    device, page = logged[1], 1 << exponent
    driver = Driver(device)
    try:
        assert device.migration.dma_logging_start([(1 << 32, WINDOW)], 4096) == 4096
        for transfers in rounds:
            cut = [(start, min(length, WINDOW - start)) for start, length in transfers]
            done = driver.run(
                *[
                    {"op": Op.FILL_GUEST, "address": (1 << 32) + start, "length": length}
                    for start, length in cut
                ],
                {"op": Op.CHECKSUM_GUEST, "address": 1 << 32, "length": WINDOW},  # reading is not writing
            )
            assert {one.status for one in done} == {Status.DONE}
            assert reported(device, page) == pages_of(cut, page)
            assert reported(device, page) == set()
    finally:
        device.migration.dma_logging_stop()


def test_the_log_sees_the_status_that_is_written_back(driver: Driver) -> None:
    """The table is guest memory too."""
    migration = driver.device.migration
    migration.dma_logging_start([(0x10000, 64 * KIB)])
    driver.one(Op.FILL_DEVICE, length=8)
    assert migration.dma_logging_report(0x10000, 64 * KIB) == (1).to_bytes(8, "little")


def test_the_log_misses_what_it_is_told_to_miss(logged: tuple[RunningServer, VfioUserDevice]) -> None:
    """With the fault armed the check above fails: it can. So it does by the fault's earlier name."""
    server, device = logged
    driver = Driver(device)
    device.migration.dma_logging_start([(1 << 32, WINDOW)])

    def log_by_fault(*, enabled: bool) -> None:
        with server.control() as control:
            arguments = {"clear": "all"} if enabled else {"fault": "op=dma-write,unlogged"}
            control.command("fault", **arguments)

    def log_by_command(*, enabled: bool) -> None:
        with server.control() as control:
            assert control.command("dma-log", enabled=enabled) == {"enabled": enabled}
            armed = [one["fault"] for one in control.command("faults")["armed"]]
            assert armed == ([] if enabled else ["op=dma-write,unlogged=yes"])

    for log in (log_by_fault, log_by_command, log_by_command):
        for value, enabled in enumerate((False, True), 7):
            log(enabled=enabled)
            outcome = driver.one(Op.FILL_GUEST, address=(1 << 32) + 8192, length=8, value=value)
            assert outcome.status is Status.DONE
            assert bytes(driver.memory((1 << 32) + 8192, 8)) == value.to_bytes(8, "little")
            assert reported(device, 4096) == ({2} if enabled else set())
    device.migration.dma_logging_stop()


def test_no_mapping_is_larger_than_its_file(device: VfioUserDevice) -> None:
    """DMA_MAP knows; the device would have found out by its death."""
    for size, offset in ((2 * MIB, 0), (MIB, 4 * KIB), (4 * KIB, MIB), (4 * KIB, 1 << 40)):
        fd = os.memfd_create("short", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, MIB)
            request = messages.DMA_MAP.pack(messages.DMA_MAP.size, READ | WRITE, offset, RAM, size)
            with pytest.raises(ClientCommandError) as caught:
                device.connection.call(uapi.VFIO_USER_DMA_MAP, request, fds=(fd,))
            assert caught.value.errno == errno.EINVAL
        finally:
            os.close(fd)


def test_a_file_that_is_shortened_costs_the_access_alone(driver: Driver, server: RunningServer) -> None:
    """Both directions, a transfer under way and the table itself; afterwards the device works as before."""
    region = driver.device.dma.regions[RAM]
    for op in (Op.TO_DEVICE, Op.TO_GUEST, Op.FILL_GUEST, Op.CHECKSUM_GUEST):
        os.ftruncate(region.fd, 4 * KIB)
        assert driver.one(op, address=RAM + 512 * KIB, length=8 * KIB).status is Status.UNMAPPED
        # What is left of it is as good as before, and a transfer into what is gone ends there.
        assert driver.one(op, address=RAM, length=4 * KIB).status is Status.DONE
        assert driver.one(op, address=RAM, length=MIB).status is Status.UNMAPPED
        os.ftruncate(region.fd, MIB)
        assert driver.one(op, address=RAM, length=MIB).status is Status.DONE
    table = driver.device.dma.regions[driver.table]
    os.ftruncate(table.fd, 0)
    driver.start(1)
    assert driver.finish() is Status.TABLE_UNREACHABLE
    os.ftruncate(table.fd, 64 * KIB)
    assert driver.one(Op.FILL_DEVICE, length=8).status is Status.DONE
    assert server.process.poll() is None
