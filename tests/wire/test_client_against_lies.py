"""Our client against every lie of `vfu-dev hostile`: told apart or harmless, and nothing hangs or leaks.

The other half of the same program runs against real QEMU in tests/lab.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev import uapi
from vfu_dev.client import ClientOptions, Connection, Migrator, VfioUserDevice
from vfu_dev.errors import ProtocolError, VfuDevError
from vfu_dev.hostile import LIES, Device, Liar, Lie, Reply, Request, Server
from vfu_dev.hostile.device import MEMORY_BYTES, TRAILER_BYTES
from vfu_dev.uapi import DeviceState

# What a client need not mind: within the protocol's letter, or about things this client does not use.
HARMLESS_SUFFIXES = ("-trickle",)
HARMLESS = {
    "version-no-data",  # the data is optional
    "version-precopy-false",
    "version-precopy-absent",
    "version-fds-17",  # limits on what we send, above what we do
    "version-fds-1099511627776",
    "version-maps-1099511627776",
    "version-xfer-67108865",
    "version-xfer-9223372036854775808",
    "version-xfer-64",
    "version-pgsizes-9223372036854775808",
    "version-migration-pgsize-9223372036854775808",
    "version-bitmap-1",
    "version-bitmap-1099511627776",
    "info-regions-0",  # counts and sizes that describe a strange device, not a broken message
    "info-regions-7",
    "info-irqs-0",
    "region-size-1p",
    "region-size-odd",
    "region-size-1",
    "region-bar0-size-0",
    "region-msix-size-16",
    "region-config-size-0",
    "region-config-size-8",
    "region-offset-max",  # of a region that cannot be mapped
    "region-sparse-ok",
    "irq-count-0",
    "irq-flags-all",  # bits a newer server may know
    "precopy-flags-all",
    "migration-flags-all",
    "migration-flags-p2p",
    "migration-flags-stop-copy",
    "info-argsz-huge",  # a newer structure may be longer; ours was sent whole
    "irq-argsz-huge",
    "precopy-argsz-huge",
    "feature-log-start-argsz-0",  # of replies that only repeat the request
    "feature-log-start-argsz-7",
    "feature-log-start-argsz-huge",
    "feature-log-stop-argsz-0",
    "feature-log-stop-argsz-7",
    "feature-log-stop-argsz-huge",
    "feature-data-size-error",  # a server without MIG_DATA_SIZE
    "feature-data-size-error-zero",
    "feature-data-size-error-huge",
    "feature-data-size-error-min",
    "data-size-0",  # an estimate, and within what is let pass
    "data-size-1",
    "precopy-initial-0",
    "read-all-ones",
    "window-offer-1",  # too small to be of use, or more than we ask for: it works without, or with less
    "window-offer-max",
    "window-refused",
} | {
    # Refused one by one; the connection goes on. test_requests_of_the_server looks at the answers.
    name for name in LIES if name.startswith("request-") and not name.startswith("request-size-")
}  # fmt: skip
# Lies whose answer never comes, or comes too late for a client that waits no longer than this.
IMPATIENT_SECONDS = 0.2
SLOW_ANSWER = ("-silent", "-silence", "-delay", "-size-more", "-wrong-id")


@contextmanager
def served(lie: Lie | None) -> Iterator[socket.socket]:
    """A hostile server in a thread; yields the client's end of its connection."""
    client, end = socket.socketpair()
    device = Device()
    device.delay_seconds = 0.5
    server = Server(device, Liar(device, lie))

    def serve() -> None:
        with end:
            server.serve(end)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield client
    finally:
        client.close()
        thread.join(timeout=PATIENCE_SECONDS)
        assert not thread.is_alive()


@contextmanager
def device_of(lie: Lie | None, timeout_seconds: float) -> Iterator[VfioUserDevice]:
    with served(lie) as sock, VfioUserDevice(Connection(sock, timeout_seconds=timeout_seconds)) as device:
        yield device


def use(device: VfioUserDevice) -> None:
    """All that a client does short of migrating."""
    info = device.info()
    for index in range(info.num_regions):
        if device.region_info(index).mappable:
            with device.map_region(index) as mapping:
                for _, memory in mapping.areas:
                    memory[0] = memory[0]
    for index in range(info.num_irqs):
        count = device.irq_info(index).count
        for fd in device.enable_irqs(index, min(count, 4)):
            os.close(fd)
        if count:
            device.disable_irqs(index)
    assert len(device.region_read(7, 0, 64)) == 64
    device.region_read(2, 0, MEMORY_BYTES)
    device.region_write(0, 0x100, b"written by the client")
    device.region_write(0, 0x100, b"posted", posted=True)
    device.dma_unmap(device.dma_map(0x10000, 1 << 20))
    device.reset()


def migrate(source: VfioUserDevice, destination: VfioUserDevice) -> None:
    """Move, with DMA logging as QEMU does it."""
    page_size = source.migration.dma_logging_start([(0, 1 << 20)])
    source.migration.dma_logging_report(0, (1 << 20) - page_size, page_size)  # 255 pages: bit 255 is outside
    options = ClientOptions(timeout_seconds=PATIENCE_SECONDS)
    state = Migrator(source, destination, options).run()
    source.migration.dma_logging_stop()
    assert state.transferred_bytes == MEMORY_BYTES + TRAILER_BYTES
    source.info()  # nothing unread is left behind the last reply


def session(lie: Lie | None, timeout_seconds: float) -> None:
    with device_of(lie, timeout_seconds) as liar, device_of(None, PATIENCE_SECONDS) as honest:
        use(liar)
        if lie is not None and lie.phase == "resume":
            migrate(honest, liar)
        else:
            migrate(liar, honest)


def test_an_honest_session_completes() -> None:
    session(None, PATIENCE_SECONDS)


def as_upstream(limit_bytes: int, seen: list[int]) -> Callable[[Device, Request, Reply], None]:
    """A server as on upstream's libvfio-user of June 2026: no sizes, replies padded to what was asked for.

    It is out of step after a message that one recv() does not take: `seen` gets the size of each payload.
    """

    def change(device: Device, request: Request, reply: Reply) -> None:
        seen.append(len(request.payload))
        assert len(request.payload) <= limit_bytes
        if request.command == uapi.VFIO_USER_VERSION:
            text = json.dumps({"capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20}})
            reply.payload[4:] = text.encode() + b"\0"
        elif request.command == uapi.VFIO_USER_MIG_DATA_READ and not reply.error:
            size = int.from_bytes(request.payload[4:8], "little")
            reply.payload = reply.payload.ljust(8 + size, b"\0")
        elif request.command == uapi.VFIO_USER_MIG_GET_PRECOPY_INFO:
            reply.flags, reply.error, reply.payload = 0x21, errno.EINVAL, bytearray()

    return change


def test_a_server_that_pads_and_receives_little_is_understood() -> None:
    """Upstream's is: migration both ways, and no message beyond what one recv() takes."""
    seen: list[int] = []
    lie = Lie("upstream", "save", "as upstream", None, 0, as_upstream((128 << 10) + 16, seen), on_errors=True)
    with device_of(lie, PATIENCE_SECONDS) as one, device_of(None, PATIENCE_SECONDS) as other:
        use(one)
        for source, destination in ((one, other), (other, one)):
            migrate(source, destination)
            source.migration.set_state(DeviceState.RUNNING)
        one.region_write(2, 0, bytes(MEMORY_BYTES))
    assert max(seen) > MEMORY_BYTES


def test_padding_is_for_servers_without_sizes_alone() -> None:
    """One that offers migration_precopy_info is ours, or knows better."""

    def pad(device: Device, request: Request, reply: Reply) -> None:
        size = int.from_bytes(request.payload[4:8], "little")
        reply.payload = reply.payload.ljust(8 + size, b"\0")

    lie = Lie("padded", "save", "padded", uapi.VFIO_USER_MIG_DATA_READ, 0, pad)
    with device_of(lie, PATIENCE_SECONDS) as device:
        device.migration.set_state(DeviceState.STOP_COPY)
        assert len(device.migration.read(MEMORY_BYTES)) == MEMORY_BYTES
        with pytest.raises(ProtocolError, match="migration data of size"):
            device.migration.read(MEMORY_BYTES)


@pytest.mark.parametrize("name", list(LIES))
def test_every_lie_is_refused_in_words_or_harmless(name: str) -> None:
    """Only errors of ours come out, with no file descriptor left behind; a real lie never passes."""
    before = set(os.listdir("/proc/self/fd"))
    told = None
    silent = name.endswith(SLOW_ANSWER) or "-delay-" in name
    try:
        session(LIES[name], IMPATIENT_SECONDS if silent else PATIENCE_SECONDS)
    except VfuDevError as error:
        told = str(error)
    assert set(os.listdir("/proc/self/fd")) <= before
    if name in HARMLESS or name.endswith(HARMLESS_SUFFIXES):
        assert told is None
    else:
        assert told is not None
        assert told.strip()
