"""Negotiation, regions, interrupts and DMA of a real server, by a client written from the specification."""

from __future__ import annotations

import errno
import json
import os
import random
import struct

import pytest
from serverkit import PATIENCE_SECONDS, RunningServer, ServerFactory, readable

from vfu_dev import uapi
from vfu_dev.client import ClientCommandError, Connection, VfioUserDevice
from vfu_dev.client import messages as wire

BAR0, BAR2, BAR4, CONFIG = 0, 2, 4, 7
MSIX = uapi.VFIO_PCI_MSIX_IRQ_INDEX
MIB = 1 << 20
SCRATCH = 0x100
IRQ_RAISE, IRQ_COUNT = 0x20, 0x24
MASK64 = (1 << 64) - 1


def fill_word(seed: int, index: int) -> int:
    """Word `index` of the FILL pattern, computed as the working contract states it."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def register(device: VfioUserDevice, offset: int, layout: str = "<I") -> int:
    data = device.region_read(BAR0, offset, struct.calcsize(layout))
    return int(struct.unpack(layout, data)[0])


def refused(call: object, *arguments: object, **options: object) -> int:
    """Return the errno that a call is refused with."""
    with pytest.raises(ClientCommandError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return caught.value.errno


# --- negotiation --------------------------------------------------------------------------------------------


def test_the_server_announces_what_it_adds(device: VfioUserDevice) -> None:
    assert (device.version.major, device.version.minor) == (0, 0)
    assert device.version.precopy_info
    assert device.version.max_data_xfer_size >= MIB
    assert device.version.capabilities["migration"] == {"pgsize": 4096, "max_bitmap_size": MIB}


def connection_to(server: RunningServer) -> Connection:
    return Connection.connect(server.socket, timeout_seconds=PATIENCE_SECONDS)


def version(connection: Connection, major: int, minor: int, data: bytes) -> memoryview:
    payload = struct.pack("<HH", major, minor) + data
    return connection.call(uapi.VFIO_USER_VERSION, payload, reply_bytes=65536).payload


def test_version_data_is_optional(server: RunningServer) -> None:
    with connection_to(server) as connection:
        reply = version(connection, 0, 0, b"")
        assert struct.unpack_from("<HH", reply) == (0, 0)


@pytest.mark.parametrize(
    ("major", "minor", "data"),
    [
        (1, 0, b""),
        (0xFFFF, 0, b""),
        (0, 0, b"{"),
        (0, 0, b'{"capabilities": 7}\0'),
        (0, 0, b'{"capabilities": {"max_msg_fds": -1}}\0'),
        (0, 0, b'{"capabilities": {"max_data_xfer_size": "big"}}\0'),
        (0, 0, b'{"capabilities": {"migration": {"pgsize": 3}}}\0'),
        (0, 0, b"\xff" * 64),
    ],
)
def test_a_bad_proposal_is_refused_and_the_next_client_served(
    server: RunningServer, major: int, minor: int, data: bytes
) -> None:
    """Refused by an error reply or a closed connection; never accepted, never the end of the server."""
    from vfu_dev.errors import VfuDevError

    with (
        connection_to(server) as connection,
        pytest.raises(VfuDevError),
    ):
        version(connection, major, minor, data)
    with server.connect() as device:
        assert device.info().num_regions == uapi.VFIO_PCI_NUM_REGIONS


def test_a_newer_minor_is_answered_with_one_that_was_proposed(server: RunningServer) -> None:
    """ "The minor version in the reply must be equal to or less than the minor version proposed"."""
    with connection_to(server) as connection:
        _, minor = struct.unpack_from("<HH", version(connection, 0, 9, b""))
        assert minor <= 9


def test_a_client_without_our_capability_is_served_too(server: RunningServer) -> None:
    """QEMU 10.2.2 unpatched announces no migration_precopy_info."""
    text = json.dumps({"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": MIB}}).encode() + b"\0"
    with connection_to(server) as connection:
        version(connection, 0, 0, text)
        reply = connection.call(
            uapi.VFIO_USER_DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0), reply_bytes=16
        )
        assert wire.parse_device_info(reply.payload).num_regions == uapi.VFIO_PCI_NUM_REGIONS


@pytest.mark.parametrize(
    ("proposed", "answered"),
    [
        ({}, {}),
        ({"max_dma_maps": 65535, "pgsizes": 4096, "write_multiple": True}, {}),
        ({"max_msg_fds": 1}, {"max_msg_fds": 8}),
        ({"max_data_xfer_size": 4096}, {"max_data_xfer_size": MIB}),
        ({"migration_precopy_info": True}, {"migration_precopy_info": True}),
        ({"migration_precopy_info": False}, {}),
    ],
)
def test_only_what_was_proposed_is_answered(
    server: RunningServer, proposed: dict[str, object], answered: dict[str, object]
) -> None:
    """ "The capability list must be a subset of those proposed"."""
    with connection_to(server) as connection:
        reply = version(connection, 0, 0, json.dumps({"capabilities": proposed}).encode() + b"\0")
        assert json.loads(bytes(reply[4:-1]))["capabilities"] == answered


def test_a_second_client_is_refused_while_the_first_is_there(server: RunningServer) -> None:
    """One client at a time: the second gets EBUSY in reply to its VERSION, and a line in the log."""
    with server.connect() as first:
        with pytest.raises(ClientCommandError, match="busy with another client") as caught:
            VfioUserDevice.connect(server.socket, timeout_seconds=PATIENCE_SECONDS)
        assert caught.value.errno == errno.EBUSY
        assert first.info().resettable
        assert server.log().count("turned away: another one is attached (EBUSY)") == 1
    with server.connect() as device:
        assert device.info().resettable


def test_the_next_client_may_come_before_the_last_is_gone(server: RunningServer) -> None:
    """Who restarts a VM lets go and connects at once; the server may hear of both in one turn."""
    for _ in range(20):
        with VfioUserDevice.connect(server.socket, timeout_seconds=PATIENCE_SECONDS) as device:
            assert device.info().resettable


# --- identity and regions -----------------------------------------------------------------------------------


def test_the_device_says_who_it_is(device: VfioUserDevice) -> None:
    config = device.region_read(CONFIG, 0, 64)
    assert struct.unpack_from("<HH", config) == (0x4656, 0x4455)
    assert (config[8], config[9:12]) == (1, b"\x00\x80\x08")
    assert register(device, 0x00) == 0x44554656
    assert register(device, 0x04) == 1
    assert register(device, 0x08, "<Q") == MIB
    assert register(device, 0x10, "<Q") == 7
    assert register(device, 0x30) == 4096
    assert register(device, 0x1C) & 1


def test_device_memory_holds_the_fill_pattern(device: VfioUserDevice) -> None:
    words = MIB // 8
    data = device.region_read(BAR2, 0, MIB)
    for index in (0, 1, 511, 512, words // 2, words - 1):
        assert struct.unpack_from("<Q", data, index * 8)[0] == fill_word(7, index)


def test_every_region_keeps_its_bounds(device: VfioUserDevice) -> None:
    """The last byte is there, the next is refused; nothing wraps around 2^32 or 2^64."""
    for index in (BAR0, BAR2, BAR4, CONFIG):
        size = device.region_info(index).size_bytes
        width = 4 if index in (BAR0, BAR4) else 1
        assert len(device.region_read(index, size - width, width)) == width
        for offset, count in [
            (size, 1),
            (size - width, width + 1),
            (size + 1, 4),
            ((1 << 32) + 4, 4),
            (1 << 63, 4),
            ((1 << 64) - 4, 4),
            ((1 << 64) - 4, 8),
        ]:
            if offset + count > size:
                assert refused(device.region_read, index, offset, count) == errno.EINVAL
                assert refused(device.region_write, index, offset, bytes(count)) == errno.EINVAL


def test_regions_that_do_not_exist_are_empty_and_refused(device: VfioUserDevice) -> None:
    for index in (1, 3, 5, 6, 8):
        assert device.region_info(index).size_bytes == 0
        assert refused(device.region_read, index, 0, 4) == errno.EINVAL
    for index in (9, 1000, (1 << 32) - 1):
        assert refused(device.region_read, index, 0, 4) == errno.EINVAL
        assert refused(device.region_info, index) == errno.EINVAL


def test_large_accesses_are_split_and_complete(device: VfioUserDevice) -> None:
    """Accesses above max_data_xfer_size take several messages; odd offsets and lengths lose nothing."""
    expected = bytearray(device.region_read(BAR2, 0, MIB))
    device.max_data_xfer_size = 100_003
    chance = random.Random(5)
    for _ in range(5):
        offset = chance.randrange(MIB - 300_000)
        data = chance.randbytes(chance.randrange(1, 300_000))
        device.region_write(BAR2, offset, data)
        expected[offset : offset + len(data)] = data
    assert device.region_read(BAR2, 0, MIB) == expected


def test_posted_writes_are_done_before_the_next_read(device: VfioUserDevice) -> None:
    for turn in range(200):
        device.region_write(BAR2, turn * 8, struct.pack("<Q", turn), posted=True)
    data = device.region_read(BAR2, 0, 1600)
    assert [value for (value,) in struct.iter_unpack("<Q", data)] == list(range(200))


def test_a_refused_posted_write_has_no_reply(device: VfioUserDevice) -> None:
    """No_reply holds for errors too: the next reply belongs to the next request."""
    device.region_write(BAR2, MIB + 4096, b"beyond", posted=True)
    device.region_write(55, 0, b"nowhere", posted=True)
    assert register(device, 0x00) == 0x44554656


def test_a_memory_above_4_gib_is_reported_and_reached_in_full(serve: ServerFactory) -> None:
    """Region sizes are 64 bits wide; libvfio-user's own vfu_reg_info_t has 32."""
    server = serve(memory="5G")
    with server.connect() as device:
        assert device.region_info(BAR2).size_bytes == 8 << 30
        assert register(device, 0x08, "<Q") == 5 << 30
        for offset in (0, (1 << 32) - 4, 1 << 32, (5 << 30) - 4):
            device.region_write(BAR2, offset, struct.pack("<I", offset >> 12 | 1))
        for offset in (0, (1 << 32) - 4, 1 << 32, (5 << 30) - 4):
            assert device.region_read(BAR2, offset, 4) == struct.pack("<I", offset >> 12 | 1)
        assert device.region_read(BAR2, 5 << 30, 4) == b"\xff\xff\xff\xff"


def test_scratch_is_cleared_by_reset_and_memory_is_not(device: VfioUserDevice) -> None:
    device.region_write(BAR0, SCRATCH, b"\x11\x22\x33\x44")
    device.region_write(BAR2, 4096, b"stays")
    device.reset()
    assert device.region_read(BAR0, SCRATCH, 4) == bytes(4)
    assert device.region_read(BAR2, 4096, 5) == b"stays"


def test_memory_survives_a_lost_connection(server: RunningServer) -> None:
    with server.connect() as device:
        device.region_write(BAR2, 0, b"still here")
    with server.connect() as device:
        assert device.region_read(BAR2, 0, 10) == b"still here"


# --- interrupts ---------------------------------------------------------------------------------------------


def test_a_register_write_raises_an_interrupt(device: VfioUserDevice) -> None:
    count = device.irq_info(MSIX).count
    assert count >= 1
    eventfds = device.enable_irqs(MSIX, count)
    try:
        for vector in range(count):
            device.region_write(BAR0, IRQ_RAISE, struct.pack("<I", vector))
            assert readable(eventfds) == [eventfds[vector]]
            assert os.eventfd_read(eventfds[vector]) == 1
        assert register(device, IRQ_COUNT) == count
        device.trigger_irq(MSIX, 0)
        assert readable(eventfds) == [eventfds[0]]
        os.eventfd_read(eventfds[0])
        device.disable_irqs(MSIX)
        device.region_write(BAR0, IRQ_RAISE, struct.pack("<I", 0))
        register(device, IRQ_COUNT)  # the write has been handled
        assert readable(eventfds, 0) == []
    finally:
        for fd in eventfds:
            os.close(fd)


def test_interrupts_beyond_the_last_are_refused(device: VfioUserDevice) -> None:
    """start + count may not leave the type, nor wrap."""
    count = device.irq_info(MSIX).count
    none = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
    for start, number in [(count, 1), (0, count + 1), ((1 << 32) - 1, 2), (1, (1 << 32) - 1)]:
        assert refused(device.set_irqs, MSIX, none, start, number) == errno.EINVAL
    for index in (5, 50, (1 << 32) - 1):
        assert refused(device.set_irqs, index, none, 0, 1) == errno.EINVAL
        assert refused(device.irq_info, index) == errno.EINVAL


# --- DMA ----------------------------------------------------------------------------------------------------


def test_more_than_sixteen_dma_regions(device: VfioUserDevice) -> None:
    """QEMU maps more than the 16 regions that libvfio-user's MAX_DMA_REGIONS allows."""
    regions = [device.dma_map(number << 20, 4096, shared=number % 2 == 0) for number in range(100)]
    for region in regions:
        device.dma_unmap(region)


def test_dma_mappings_may_not_overlap_and_are_unmapped_exactly(device: VfioUserDevice) -> None:
    region = device.dma_map(0x100000, 0x10000)
    for iova, size in [(0x108000, 0x10000), (0xF8000, 0x10000), (0x104000, 0x1000), (0xF0000, 0x30000)]:
        assert refused(device.dma_map, iova, size) == errno.EEXIST
    assert refused(device.dma_map, 0x100000, 0x10000) == errno.EEXIST  # another file
    half = wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, 0, 0x100000, 0x8000)
    assert refused(device.connection.call, uapi.VFIO_USER_DMA_UNMAP, half, reply_bytes=24) in (
        errno.ENOENT,
        errno.EINVAL,
    )
    device.dma_unmap(region)


def test_dma_logging_passes_over_regions_without_a_file(device: VfioUserDevice) -> None:
    """QEMU's firmware ROM is always such a region; a report has one bit a page and nothing beyond."""
    device.dma_map(0, 1 << 20)
    device.dma_map(0xFFFC0000, 0x40000, flags=uapi.VFIO_DMA_MAP_FLAG_READ, shared=False)
    logging = device.migration
    page_size = logging.dma_logging_start([(0, 1 << 20), (0xFFFC0000, 0x40000)])
    assert page_size >= 4096
    for iova, length in [(0, 1 << 20), (4096, 4096 * 77), (0xFFFC0000, 0x40000), (0, 1 << 32)]:
        assert not any(logging.dma_logging_report(iova, length, page_size))
    logging.dma_logging_stop()
    assert refused(logging.dma_logging_report, 0, 1 << 20, page_size) == errno.EINVAL
    logging.dma_logging_start([(0, 1 << 20)], page_size)
    logging.dma_logging_stop()
