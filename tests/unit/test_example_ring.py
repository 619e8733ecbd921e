"""docs/examples/ring.py: DMA both ways, a worker and an interrupt, moved in the middle of its work."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vfu_dev.cli.loader import find_class
from vfu_dev.testing import InMemoryClient, check_device, move

SPEC = f"{Path(__file__).parents[2] / 'docs' / 'examples' / 'ring.py'}:Ring"
BASE, SIZE, TAIL, HEAD, ERROR, DONE = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x18
RING, BUFFERS = 0x1000, 0x4000
GOOD, FAILED = 1, 2


@pytest.fixture(scope="module")
def ring() -> Any:
    """Return the class."""
    return find_class(SPEC)


class Driver:
    """The device's driver, and the guest memory that it has."""

    def __init__(self, client: InMemoryClient, memory: bytearray, descriptors: int = 8) -> None:
        self.client, self.memory = client, memory
        self.form = sys.modules["ring"].DESCRIPTOR
        self.descriptors = np.frombuffer(memory, self.form, descriptors, 0)

    def write(self, offset: int, value: int, width: int = 4) -> None:
        """Write a register."""
        self.client.region_write(0, offset, value.to_bytes(width, "little"))

    def read(self, offset: int, width: int = 4) -> int:
        """Read a register."""
        return int.from_bytes(self.client.region_read(0, offset, width), "little")

    def begin(self) -> None:
        """Say where the ring is."""
        self.write(BASE, RING, 8)
        self.write(SIZE, len(self.descriptors))

    def give(self, packets: list[bytes], first: int = 0) -> None:
        """Fill descriptors; the doorbell is the caller's to ring."""
        for index, packet in enumerate(packets, first):
            at = BUFFERS - RING + 4096 * index
            self.memory[at : at + len(packet)] = packet
            self.descriptors[index] = (RING + at, len(packet), 0, 0, 0)


@pytest.fixture
def driver(ring: Any) -> Iterator[Driver]:
    """Return the driver of a device that has 64 KiB of guest memory."""
    with InMemoryClient(ring("here")) as client:
        memory = client.dma_map(RING, 64 << 10).memory
        found = Driver(client, memory)
        found.begin()
        yield found


PACKETS = [b"one", b"two" * 100, bytes(2048), b"four"]
CRCS = [zlib.crc32(packet) for packet in PACKETS]


def test_it_keeps_the_contract(ring: Any) -> None:
    """All ten checks, whatever a guest writes."""
    check_device(ring)


def test_packets_are_taken_and_answered(driver: Driver) -> None:
    """CRC and status are in guest memory, the packet in the device's, and each has its interrupt."""
    driver.give(PACKETS)
    driver.client.work()
    assert driver.client.irqs == []  # no doorbell yet
    driver.write(TAIL, 4)
    driver.client.work()
    assert driver.client.irqs == [0] * 4
    assert list(driver.descriptors["crc"][:4]) == CRCS
    assert list(driver.descriptors["status"]) == [GOOD] * 4 + [0] * 4
    assert (driver.read(HEAD), driver.read(DONE, 8), driver.read(ERROR)) == (4, 4, 0)
    assert bytes(driver.client.region_read(2, 2048, 300)) == PACKETS[1]
    # Around its end.
    driver.give([b"x"] * 4, 4)
    driver.write(TAIL, 0)
    driver.client.work()
    assert (driver.read(HEAD), driver.read(DONE, 8)) == (0, 8)


def test_it_moves_in_the_middle_of_its_work(driver: Driver, ring: Any) -> None:
    """The destination goes on with the descriptor that the source did not come to."""
    driver.give(PACKETS)
    driver.write(TAIL, 4)
    driver.client.device.work(0)  # one packet
    assert driver.read(HEAD) == 1
    with InMemoryClient(ring("there")) as there:
        # Guest memory moves by QEMU.
        other = Driver(there, there.dma_map(RING, 64 << 10).memory)
        move(driver.client, there)
        other.memory[:] = driver.memory
        there.work()
        assert there.irqs == [0] * 3
        assert list(other.descriptors["crc"][:4]) == CRCS
        assert other.read(DONE, 8) == 4
        assert bytes(there.region_read(2, 0, 3)) == PACKETS[0]
        assert bytes(there.region_read(2, 3 * 2048, 4)) == PACKETS[3]


def test_what_a_driver_gets_wrong_ends_where_it_is(driver: Driver) -> None:
    """A packet out of reach fails alone; a ring out of reach stops the device; neither is tried for ever."""
    driver.give([b"good", b"bad", b"", b"good"])
    driver.descriptors["address"][1] = 0xDEAD0000
    driver.write(TAIL, 4)
    driver.client.work()
    assert list(driver.descriptors["status"][:4]) == [GOOD, FAILED, FAILED, GOOD]
    driver.write(BASE, (1 << 64) - 8, 8)
    driver.write(TAIL, 6)
    driver.client.work()
    assert (driver.read(ERROR), driver.read(HEAD)) == (1, 4)
    assert driver.client.device.work_due() is None
    for size, tail in ((0, 0), (8, 8), (1 << 31, 5), (8, 0xFFFF_FFFF)):
        driver.write(SIZE, size)
        driver.write(TAIL, tail)
        assert driver.client.device.work_due() is None, (size, tail)


def test_a_reset_while_memory_is_waited_for_ends_the_packet(driver: Driver) -> None:
    """What was under way then is nobody's: no register, no packet and no interrupt of it appears."""
    driver.give(PACKETS)
    guest, client = driver.client.bus, driver.client
    read, reads = guest.read, []

    def interrupted(address: int, out: memoryview) -> None:
        read(address, out)
        reads.append(address)
        if len(reads) == 2:  # the packet of the first descriptor
            client.reset()

    guest.read = interrupted  # type: ignore[method-assign]
    driver.write(TAIL, 4)
    client.work()
    assert len(reads) == 2
    assert client.irqs == []
    assert (driver.read(HEAD), driver.read(DONE, 8), driver.read(ERROR)) == (0, 0, 0)
    assert bytes(client.region_read(2, 0, 8)) == bytes(8)
    assert driver.descriptors["status"][0] == 0
