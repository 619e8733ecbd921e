"""The long run without QEMU, `make soak`: one device's state moved a thousand times between two servers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from dmakit import Driver
from growthkit import FIGURES, Growth
from serverkit import RunningServer, ServerFactory, wait_until

from vfu_dev.client import VfioUserDevice
from vfu_dev.client.migrator import ClientProgress, Migrator
from vfu_dev.device.reference.layout import WriterStatus
from vfu_dev.device.reference.writer import expected_pages
from vfu_dev.uapi import VFIO_PCI_BAR2_REGION_INDEX as BAR2

pytestmark = pytest.mark.soak

MOVES = 1000
MOVES_A_CONNECTION = 20
SAMPLE_MOVES = 10
KIB = 1 << 10
MEMORY_BYTES = 512 * KIB
PAGE_BYTES = 4096
# The client's memory, which the device's writer writes all the time; the same addresses on both sides.
GUEST_IOVA, GUEST_BYTES = 0x10_0000, 256 * KIB
BUFFER, BUFFER_BYTES = GUEST_IOVA + 64 * KIB, 128 * KIB
WRITER_RATE = 64 << 20


class Ends:
    """The two ends, each with a client and its guest memory; the state is at `here`."""

    def __init__(self, servers: list[RunningServer]) -> None:
        self.servers = servers
        self.devices: list[VfioUserDevice] = []
        self.here = 0

    def connect(self) -> None:
        """Connect a client to each, anew."""
        self.leave()
        self.devices = [server.connect() for server in self.servers]
        for device in self.devices:
            device.dma_map(GUEST_IOVA, GUEST_BYTES)
            Driver(device)  # its firmware makes it bus master

    def leave(self) -> None:
        """Let go of both."""
        while self.devices:
            self.devices.pop().close()

    @property
    def source(self) -> VfioUserDevice:
        """Where the state is."""
        return self.devices[self.here]

    @property
    def destination(self) -> VfioUserDevice:
        """Where it goes."""
        return self.devices[1 - self.here]


class Content:
    """What device memory has to hold, and a client that writes it."""

    def __init__(self, content: bytes) -> None:
        self.bytes = np.frombuffer(content, np.uint8).copy()
        self.written = {"before": 0, "during": 0}
        self._random = random.Random(1)

    def write(self, device: VfioUserDevice, when: str) -> None:
        """Write some bytes somewhere."""
        count = self._random.choice((1, 8, 64, PAGE_BYTES, 3 * PAGE_BYTES))
        offset = self._random.randrange(MEMORY_BYTES - count)
        data = self._random.randbytes(count)
        device.region_write(BAR2, offset, data)
        self.bytes[offset : offset + count] = np.frombuffer(data, np.uint8)
        self.written[when] += 1


def carry_guest_memory(source: VfioUserDevice, destination: VfioUserDevice) -> None:
    """Copy the pages that the log of the device's writes names, as a VMM does at the stop."""
    bitmap = int.from_bytes(source.migration.dma_logging_report(GUEST_IOVA, GUEST_BYTES), "little")
    ours, theirs = (device.dma.regions[GUEST_IOVA].memory for device in (source, destination))
    for page in range(GUEST_BYTES // PAGE_BYTES):
        if bitmap >> page & 1:
            where = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
            theirs[where] = ours[where]


def move(ends: Ends, content: Content) -> None:
    """Move the state to the other end, under writes; device memory is as it has to be."""
    source, destination = ends.source, ends.destination
    source.migration.dma_logging_start([(GUEST_IOVA, GUEST_BYTES)])
    destination.dma.regions[GUEST_IOVA].memory[:] = source.dma.regions[GUEST_IOVA].memory[:]
    left = 4

    def write(state: ClientProgress) -> None:
        nonlocal left
        if state.phase == "pre-copy" and left:
            left -= 1
            content.write(source, "during")

    def verify() -> None:
        carry_guest_memory(source, destination)

    progress = Migrator(source, destination, reporter=write, verify=verify).run()
    assert progress.precopy_bytes > MEMORY_BYTES / 2, "nothing went in pre-copy"
    source.migration.dma_logging_stop()
    saved = ends.servers[ends.here].audited()["save"]
    resumed = ends.servers[1 - ends.here].status()["resume"]
    assert (saved["status"], resumed["status"]) == ("completed", "completed")
    assert saved["digest"] == resumed["digest"] is not None
    assert saved["audited"] is True
    ends.here = 1 - ends.here
    assert bytes(ends.source.region_read(BAR2, 0, MEMORY_BYTES)) == content.bytes.tobytes()


def check_guest_memory(device: VfioUserDevice) -> int:
    """Stop the writer; return its stamps, all of which have to be in guest memory. Then it begins anew."""
    driver = Driver(device)
    driver["writer_ctrl"] = 0
    wait_until(lambda: driver["writer_status"] != WriterStatus.WRITING, "the writer has stopped")
    stamps, pages = driver["writer_count"], BUFFER_BYTES // PAGE_BYTES
    words = np.frombuffer(driver.memory(BUFFER, BUFFER_BYTES), np.uint64).reshape(pages, -1)
    assert np.array_equal(words, np.broadcast_to(expected_pages(pages, stamps)[:, np.newaxis], words.shape))
    driver.memory(BUFFER, BUFFER_BYTES)[:] = bytes(BUFFER_BYTES)
    driver["writer_ctrl"] = 1
    return stamps


def test_a_thousand_moves_without_a_mismatch_and_without_growth(serve: ServerFactory) -> None:
    """There and back, written before and during; device memory, guest memory, digests, and what both hold."""
    servers = [serve("--fill", "1", memory="512K"), serve(memory="512K")]
    growth = Growth({server.socket.name: (server.process.pid, server.log_path) for server in servers})
    ends, content = Ends(servers), None
    for number in range(1, MOVES + 1):
        if number % MOVES_A_CONNECTION == 1:
            ends.connect()  # the device's registers begin anew, its memory does not
            assert Driver(ends.source).write_on(BUFFER, BUFFER_BYTES, WRITER_RATE) is WriterStatus.WRITING
        if content is None:
            content = Content(bytes(ends.source.region_read(BAR2, 0, MEMORY_BYTES)))
        for _ in range(4):
            content.write(ends.source, "before")
        move(ends, content)
        assert check_guest_memory(ends.source) > 0, f"move {number}: the device's writer wrote nothing"
        if number % SAMPLE_MOVES == 0:
            growth.sample(number)
    ends.leave()  # the source's last move is completed only when its device leaves STOP
    assert content is not None
    assert content.written["before"] == 4 * MOVES
    assert content.written["during"] >= MOVES
    for end, server in enumerate(servers):
        wait_until(lambda server=server: not server.status()["connected"], "its client is gone")  # type: ignore[misc]
        with server.control() as control:
            totals = control.command("figures")["snapshot"]["totals"]
        counted = [
            {name: count for name, count in totals[kind].items() if count} for kind in ("saves", "resumes")
        ]
        assert counted == [{"completed": MOVES // 2}, {"completed": MOVES // 2}], (end, totals)
    if (where := os.environ.get(FIGURES)) is not None:
        Path(where, "without-qemu.json").write_text(json.dumps(growth.to_json()))
    assert growth.problems() == []
