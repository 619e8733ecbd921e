"""Target `client`: our client, with a server that sends anything.

The input is records: a kind, the body's size in two bytes, the body. All of it is sent before the client asks
for anything, because message ids are known: replies are numbered as requests are.

    REPLY    command, flags, error, descriptors, then the data: the reply to the next request
    REQUEST  command (11 or 12), flags, then the data: a request of the server's own, such as DMA_READ
    BYTES    as they are

Whatever it is: the client raises its own errors and no others, closes every descriptor, and lets the server
read and write what was mapped for it, and nothing else.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator

import atheris

from vfu_dev import uapi
from vfu_dev.client import messages
from vfu_dev.client.connection import Connection
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.dma import ClientDmaRegion, DmaSpace
from vfu_dev.client.frames import HEADER
from vfu_dev.errors import VfuDevError
from vfu_dev.uapi import DeviceState

REPLY, REQUEST, BYTES, KINDS = 0, 1, 2, 3
READABLE, WRITABLE, MAPPED_BYTES = 0x10000, 0x20000, 8192
_RECORD = struct.Struct("<BH")
_FIRST_REQUEST_ID = 0x100


def records_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (kind, body) of each record; the last one may be cut off."""
    position = 0
    while position + _RECORD.size <= len(data):
        kind, size = _RECORD.unpack_from(data, position)
        position += _RECORD.size
        yield kind % KINDS, data[position : position + size]
        position += size


def join(records: list[tuple[int, bytes]]) -> bytes:
    """Return the input that `records_of` takes apart."""
    return b"".join(_RECORD.pack(kind, len(body)) + body for kind, body in records)


def _send(server: socket.socket, data: bytes) -> tuple[int, int]:
    """Send all records; returns how many replies and requests there were."""
    replies = requests = 0
    for kind, body in records_of(data):
        fds: list[int] = []
        if kind == BYTES:
            message = body
        elif kind == REPLY:
            command, flags, error, fd_count = (*body[:4], 0, 0, 0, 0)[:4]
            flags = flags & ~uapi.VFIO_USER_TYPE | uapi.VFIO_USER_REPLY
            message = HEADER.pack(replies, command, HEADER.size + len(body[4:]), flags, error) + body[4:]
            fds = [os.memfd_create("fuzz") for _ in range(fd_count % 20)]
            for fd in fds:
                os.ftruncate(fd, 65536)
            replies += 1
        else:
            command, flags = (*body[:2], 0, 0)[:2]
            flags &= uapi.VFIO_USER_NO_REPLY
            number = _FIRST_REQUEST_ID + requests
            message = HEADER.pack(number, command, HEADER.size + len(body[2:]), flags, 0) + body[2:]
            requests += 1
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if message:
            server.sendmsg([message], rights)
        for fd in fds:
            os.close(fd)
    return replies, requests


def _session(device: VfioUserDevice) -> Iterator[Callable[[], object]]:
    """Yield what a client does, one request after another."""
    migration = device.migration
    both = uapi.VFIO_DMA_MAP_FLAG_READ | uapi.VFIO_DMA_MAP_FLAG_WRITE
    yield lambda: device.dma_map(READABLE, MAPPED_BYTES, flags=uapi.VFIO_DMA_MAP_FLAG_READ, shared=False)
    yield lambda: device.dma_map(WRITABLE, MAPPED_BYTES, flags=both, shared=False)
    yield device.info
    for index in range(3):
        yield lambda index=index: device.region_info(index)
    yield lambda: device.map_region(0).close()
    yield lambda: device.irq_info(2)
    yield lambda: device.region_read(0, 16, 24)
    yield lambda: device.region_write(0, 16, bytes(8))
    yield device.reset
    yield migration.flags
    yield migration.get_state
    yield lambda: migration.set_state(DeviceState.PRE_COPY)
    yield migration.precopy_info
    yield lambda: migration.read(100)
    yield migration.data_size
    yield lambda: migration.set_state(DeviceState.STOP_COPY)
    yield lambda: migration.read(100)
    yield lambda: migration.write(bytes(100))
    yield lambda: migration.dma_logging_start([(0, 1 << 20)])
    yield lambda: migration.dma_logging_report(0, 1 << 20)
    yield migration.dma_logging_stop
    yield lambda: device.dma_unmap(device.dma.regions[WRITABLE])


def _judge(server: socket.socket) -> None:
    """Look at what the client sent: its answers to the server's requests have nothing that is not mapped."""
    data = bytearray()
    for _ in range(2):  # that the client left replies unread comes before what it sent
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while piece := server.recv(1 << 20, socket.MSG_DONTWAIT):
                data += piece
    position = 0
    while position + HEADER.size <= len(data):
        _, command, size, flags, error = HEADER.unpack_from(data, position)
        assert size >= HEADER.size, f"the client sent a message of {size} bytes"
        body = bytes(data[position + HEADER.size : position + size])
        if flags & uapi.VFIO_USER_TYPE == uapi.VFIO_USER_REPLY:
            assert bool(flags & uapi.VFIO_USER_ERROR) == bool(error), (flags, error)
            assert not (error and body), "an error with data"
            if command == uapi.VFIO_USER_DMA_READ and not error:
                address, count = messages.DMA_ACCESS.unpack_from(body)
                mapped = any(
                    start <= address and address + count <= start + MAPPED_BYTES
                    for start in (READABLE, WRITABLE)
                )
                assert mapped, (address, count)
                assert len(body) == messages.DMA_ACCESS.size + count, (count, len(body))
        position += size


def run_one(data: bytes) -> None:
    """Have a client live through one input."""
    before = set(os.listdir("/proc/self/fd"))
    server, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        _send(server, data)
        server.shutdown(socket.SHUT_WR)
        with contextlib.suppress(VfuDevError), VfioUserDevice(Connection(ours)) as device:
            for step in _session(device):
                # After an error that ends the connection all others fail at once.
                with contextlib.suppress(VfuDevError, KeyError):
                    step()
            if READABLE in device.dma.regions:
                unchanged = bytes(device.dma.regions[READABLE].memory) == bytes(MAPPED_BYTES)
                assert unchanged, "the server wrote to memory that it may only read"
        _judge(server)
    left_open = set(os.listdir("/proc/self/fd")) - before  # what was garbage before may be gone
    assert not left_open, f"descriptors are left open: {sorted(left_open)}"


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a record, or the list of them; libFuzzer's own mutations work within a record."""
    rng = random.Random(seed)
    found = list(records_of(data))
    if not found or rng.random() < 0.02:
        return atheris.Mutate(data, max_size)  # type: ignore[no-any-return]
    at = rng.randrange(len(found))
    kind, body = found[at]
    what = rng.randrange(8)
    if what == 0:
        found.insert(rng.randrange(len(found) + 1), found[at])
    elif what == 1:
        del found[at]
    elif what == 2:
        found.insert(rng.randrange(len(found)), found.pop(at))
    elif what == 3:
        found[at] = (rng.randrange(KINDS), body)
    elif what == 4 and len(body) >= 4:
        value = rng.choice([0, 1, 0xFF, 0x1000, 0x10000, 0x20000, 0x7FFFFFFF, 0xFFFFFFFF, 8192, 8193])
        start = rng.randrange(len(body) - 3)
        found[at] = (kind, body[:start] + value.to_bytes(4, "little") + body[start + 4 :])
    else:
        found[at] = (
            kind,
            atheris.Mutate(body, min(len(body) + 64, 2000)) if body else bytes(rng.randrange(40)),
        )
    return join(found)[:max_size]


def plant() -> None:
    """Let the server write wherever it may read."""
    plain = DmaSpace.create

    def create(self: DmaSpace, iova: int, size_bytes: int, flags: int, shared: bool) -> ClientDmaRegion:
        return plain(self, iova, size_bytes, flags | uapi.VFIO_DMA_MAP_FLAG_WRITE, shared)

    DmaSpace.create = create  # type: ignore[method-assign]
