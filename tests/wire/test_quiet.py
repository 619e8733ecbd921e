"""Quiesce over the wire: nothing is started in P2P states and later, and nothing that was due is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from dmakit import KIB, MIB, Driver, carry
from serverkit import RunningServer, ServerFactory, readable, wait_until

from vfu_dev.client import VfioUserDevice
from vfu_dev.device.reference.layout import FLAG_INTERRUPT, Op, Status, WriterStatus
from vfu_dev.device.reference.writer import expected_pages
from vfu_dev.uapi import VFIO_PCI_MSIX_IRQ_INDEX as MSIX
from vfu_dev.uapi import DeviceState as S

RAM = 0x100000


@contextmanager
def attached(server: RunningServer) -> Iterator[tuple[VfioUserDevice, Driver, list[int]]]:
    """Yield a client with guest memory, its driver, and an eventfd for each vector."""
    with server.connect() as device:
        device.dma_map(0x10000, 64 * KIB)
        device.dma_map(RAM, MIB)
        eventfds = device.enable_irqs(MSIX, 4)
        try:
            yield device, Driver(device), eventfds
        finally:
            for fd in eventfds:
                os.close(fd)


@pytest.mark.parametrize("state", [S.RUNNING_P2P, S.PRE_COPY_P2P])
def test_a_quiet_device_serves_accesses_and_starts_nothing(server: RunningServer, state: S) -> None:
    """Registers work, a doorbell is taken; DMA and interrupts wait until the device runs."""
    with attached(server) as (device, driver, eventfds):
        driver.put({"op": Op.FILL_GUEST, "address": RAM, "length": 4096, "value": 1, "flags": FLAG_INTERRUPT})
        device.migration.set_state(state)
        driver.start(1)
        driver["irq_raise"] = 3
        assert driver.write_on(RAM + 8192, 8192, 1 << 30) is WriterStatus.WRITING
        for _ in range(100):  # each is a turn of the server's loop, in which it could have started something
            assert driver["dma_status"] == Status.BUSY
        assert driver["writer_count"] == 0
        assert not any(driver.memory(RAM, 16384))
        assert readable(eventfds, 0) == []
        device.migration.set_state(S.RUNNING)
        assert driver.finish() is Status.IDLE
        assert driver.outcomes(1)[0].status is Status.DONE
        wait_until(lambda: driver["writer_count"] > 2, "the writer writes")
        driver["writer_ctrl"] = 0
        assert readable(eventfds) == [eventfds[0], eventfds[3]]
        assert [os.eventfd_read(fd) for fd in (eventfds[0], eventfds[3])] == [1, 1]


def test_a_migration_that_is_given_up_delivers_at_the_source(server: RunningServer) -> None:
    with attached(server) as (device, driver, eventfds):
        device.migration.set_state(S.PRE_COPY_P2P)
        driver["irq_raise"] = 2
        device.migration.set_state(S.STOP_COPY)
        device.migration.set_state(S.RUNNING)
        assert readable(eventfds) == [eventfds[2]]
        assert os.eventfd_read(eventfds[2]) == 1


def test_the_writer_goes_on_where_it_was_and_loses_no_stamp(serve: ServerFactory) -> None:
    with attached(serve()) as (source, driver, _), attached(serve()) as (target, moved, _):
        assert driver.write_on(RAM, 256 * KIB, 64 * MIB) is WriterStatus.WRITING
        wait_until(lambda: driver["writer_count"] > 100, "the writer writes")
        source.migration.set_state(S.PRE_COPY_P2P)
        at_stop = driver["writer_count"]
        carry(source, target)
        wait_until(lambda: moved["writer_count"] > at_stop + 100, "the writer goes on")
        moved["writer_ctrl"] = 0
        words = np.frombuffer(bytes(moved.memory(RAM, 256 * KIB)), np.uint64).reshape(64, 512)
        assert (words == expected_pages(64, moved["writer_count"])[:, np.newaxis]).all()
        assert driver["writer_count"] == at_stop


@pytest.mark.parametrize(
    ("buffer", "status"),
    [(RAM + MIB - 4096, WriterStatus.UNREACHABLE), (RAM + 1, WriterStatus.BAD_BUFFER)],
)
def test_the_writer_stops_where_there_is_no_memory(
    server: RunningServer, buffer: int, status: WriterStatus
) -> None:
    with attached(server) as (_, driver, _):
        driver.write_on(buffer, 8192, 1 << 30)
        wait_until(lambda: driver["writer_status"] == status, "the writer says why it stopped")
        assert driver["writer_ctrl"] == 0
        driver.set_command(2)
        driver.write_on(RAM, 8192, 1 << 30)
        wait_until(lambda: driver["writer_status"] == WriterStatus.NO_BUS_MASTER, "no bus master")
