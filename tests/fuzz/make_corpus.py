"""The first inputs of each target, for `fuzz.py corpus`.

What our own client says to a real server, and hears from it, is recorded; streams come from a real device.
The others are sequences of valid steps. `fuzz.py corpus` adds what a fuzzer found beyond them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import clientfuzz
import streamfuzz
from fuzzkit import TARGETS
from migrationkit import filled
from oldstream import version_1
from serverkit import server_farm

from vfu_dev import uapi
from vfu_dev.builds import artifact
from vfu_dev.client.connection import Connection
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.frames import HEADER
from vfu_dev.errors import VfuDevError
from vfu_dev.uapi import DeviceState

# native/fuzz/libvfio-user/server.c: SETUP_* and the kinds of its records.
OWN_CONFIG, P2P, PRE_COPY, GATHER, QUIESCE, UNREAD, FAILURES, WAIT = 1, 2, 4, 8, 0x10, 0x100, 0x200, 0x800
WINDOW, ACCESSES, MEMORY = 0x1000, 0x2000, 0x4000
SECOND_FILE = 0x09  # one descriptor, of the client's second file
MESSAGE, BYTES, DMA, ANSWER, DEVICE, FILES, PAUSE, HANG_UP = range(8)
GUEST_BASE = 0x100000

Frames = list[tuple[bytes, int]]  # a message, and how many descriptors came with it


def record(kind: int, *parts: bytes | int) -> bytes:
    """Return one record; a number is a byte."""
    body = b"".join(bytes([part]) if isinstance(part, int) else part for part in parts)
    return struct.pack("<BH", kind, len(body)) + body


# --- recording ----------------------------------------------------------------------------------------------


def _frames(pieces: list[tuple[bytes, int]]) -> Frames:
    data = b"".join(piece for piece, _ in pieces)
    starts, at = [], 0
    for piece, count in pieces:
        starts.append((at, count))
        at += len(piece)
    found: Frames = []
    position = 0
    while position < len(data):
        size = HEADER.unpack_from(data, position)[2]
        count = sum(count for start, count in starts if position <= start < position + size)
        found.append((data[position : position + size], count))
        position += size
    return found


def _forward(source: socket.socket, to: socket.socket, kept: list[tuple[bytes, int]]) -> None:
    while True:
        data, fds, _, _ = socket.recv_fds(source, 1 << 16, 16)
        if not data:
            with contextlib.suppress(OSError):
                to.shutdown(socket.SHUT_WR)
            return
        kept.append((data, len(fds)))
        socket.send_fds(to, [data], fds) if fds else to.sendall(data)
        for fd in fds:
            os.close(fd)


def record_session(path: Path) -> tuple[Frames, Frames]:
    """Run a session of our client with the server on `path`; return what it sent, and what it got."""
    ours, relay = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(str(path))
    sent: list[tuple[bytes, int]] = []
    got: list[tuple[bytes, int]] = []
    threads = [
        threading.Thread(target=_forward, args=(relay, server, sent)),
        threading.Thread(target=_forward, args=(server, relay, got)),
    ]
    for thread in threads:
        thread.start()
    with VfioUserDevice(Connection(ours), max_data_xfer_size=256) as device:
        for step in clientfuzz._session(device):
            with contextlib.suppress(VfuDevError):
                step()
    for thread in threads:
        thread.join()
    server.close()
    relay.close()
    return _frames(sent), _frames(got)


# --- inputs -------------------------------------------------------------------------------------------------


def _map(iova: int, size: int, *, fd: bool, flags: int = 3) -> bytes:
    body = struct.pack("<IIQQQ", 32, flags, 0, iova, size)
    return record(MESSAGE, 1 if fd else 0, uapi.VFIO_USER_DMA_MAP, 0, body)


def _feature(flags: int, data: bytes = b"") -> bytes:
    return record(
        MESSAGE, 0, uapi.VFIO_USER_DEVICE_FEATURE, 0, struct.pack("<II", 8 + len(data) + 4096, flags), data
    )


def _state(state: DeviceState) -> bytes:
    flags = uapi.VFIO_DEVICE_FEATURE_SET | uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
    return _feature(flags, struct.pack("<Ii", state, -1))


def _dma(address: int, size: int, flags: int) -> bytes:
    return record(DMA, flags, struct.pack("<QH", address, size))


def server_inputs(sent: Frames) -> Iterator[bytes]:
    """Yield inputs of the target `server`."""
    session = []
    for message, fds in sent[1:]:
        _, command, _, flags, _ = HEADER.unpack_from(message)
        body = message[HEADER.size :]
        if flags & uapi.VFIO_USER_TYPE == uapi.VFIO_USER_REPLY:
            session.append(record(ANSWER, 0, body[16:]))
        elif len(body) < 600:
            session.append(record(MESSAGE, fds, command, flags, body))
    for setup in (
        OWN_CONFIG | P2P | PRE_COPY | GATHER,
        P2P | PRE_COPY | FAILURES,
        PRE_COPY | UNREAD,
        QUIESCE,
    ):
        for start in range(0, len(session), 12):
            yield struct.pack("<H", setup) + b"".join(session[start : start + 12])
    setup = struct.pack("<H", OWN_CONFIG | P2P | PRE_COPY)
    regions = _map(GUEST_BASE, 65536, fd=True) + _map(GUEST_BASE + 65536, 65536, fd=False)
    read = record(MESSAGE, 0, uapi.VFIO_USER_REGION_READ, 0, struct.pack("<QII", 0, 0, 8))
    start = _feature(0x20006, struct.pack("<QIIQQ", 4096, 1, 0, GUEST_BASE, 1 << 20))
    report = _feature(0x10008, struct.pack("<QQQ", GUEST_BASE, 1 << 17, 4096))
    message = GUEST_BASE + 65536
    for answer in range(5):
        for crossing in (b"", read, record(MESSAGE, 0, uapi.VFIO_USER_DEVICE_RESET, 0)):
            for flags in (0, 1):
                yield (
                    setup
                    + regions
                    + _dma(message, 100, flags)
                    + crossing
                    + record(ANSWER, answer, bytes(100))
                )
    yield setup + regions + start + _dma(GUEST_BASE, 5000, 1) + _dma(GUEST_BASE, 100, 0) + report
    yield setup + regions + _dma(GUEST_BASE, 100, 0) + record(FILES, 0, 1) + _dma(GUEST_BASE + 8192, 100, 1)
    for state in DeviceState:
        yield setup + _state(DeviceState.PRE_COPY) + _state(state) + record(HANG_UP) + read
    irqs = struct.pack("<IIIII", 28, 0x24, 2, 0, 2)
    yield (
        setup
        + record(MESSAGE, 0x12, uapi.VFIO_USER_DEVICE_SET_IRQS, 0, irqs)
        + b"".join(record(DEVICE, what, b"\1\0") for what in range(8))
    )
    reset = record(MESSAGE, 0, uapi.VFIO_USER_DEVICE_RESET, 0)
    sgl = b"".join(record(DEVICE, 7, struct.pack("<H", number)) for number in (0, 16, 4000))
    yield setup + regions + start + sgl + report
    # Configuration space as the library keeps it: each register, and each capability.
    for plain in (struct.pack("<H", P2P), struct.pack("<H", QUIESCE)):
        for size in (1, 2, 4):
            access = [
                record(MESSAGE, 0, command, 0, struct.pack("<QII", offset, 7, size), data)
                for offset in range(0, 0x80, size)
                for command, data in (
                    (uapi.VFIO_USER_REGION_WRITE, b"\xff\x81\xff\xff"[:size]),
                    (uapi.VFIO_USER_REGION_READ, b""),
                )
            ]
            for at in range(0, len(access), 16):
                yield plain + b"".join(access[at : at + 16])
        yield plain + record(MESSAGE, 0, uapi.VFIO_USER_REGION_READ, 0, struct.pack("<QII", 0, 7, 4096))
    # What comes with descriptors, and what is too long to be sent at once.
    info = struct.pack("<IIIIQQ", 4096, 0, 0, 0, 0, 0)
    io_fds = struct.pack("<IIII", 4096, 0, 0, 0)
    large = record(MESSAGE, 0, uapi.VFIO_USER_REGION_READ, 0, struct.pack("<QII", 0, 0, 65536))
    for bits in (P2P, P2P | UNREAD):
        yield (
            struct.pack("<H", bits)
            + record(MESSAGE, 0, uapi.VFIO_USER_DEVICE_GET_REGION_INFO, 0, info)
            + record(MESSAGE, 0, uapi.VFIO_USER_DEVICE_GET_REGION_IO_FDS, 0, io_fds)
            + large * 40
        )
    yield (
        setup
        + _state(DeviceState.PRE_COPY)
        + _feature(0x2000C)
        + record(MESSAGE, 0, uapi.VFIO_USER_MIG_GET_PRECOPY_INFO, 0, struct.pack("<IIQQ", 24, 0, 0, 0))
    )
    # A transfer that is given up because requests wait, whose reply comes late; half a message before it.
    for bits in (OWN_CONFIG, OWN_CONFIG | WAIT):
        short = struct.pack("<H", bits) + regions
        yield short + _dma(message, 100, 0) + reset
        yield short + _dma(message, 100, 0) + reset + record(PAUSE, b"\x88\x13") + record(ANSWER, 0)
        half = HEADER.pack(9, uapi.VFIO_USER_REGION_READ, 32, 0, 0)
        yield short + record(BYTES, 0, half) + _dma(message, 100, 1) + record(BYTES, 0, bytes(16))
        yield (
            short + record(BYTES, 0, half[:5]) + _dma(message, 100, 1) + record(BYTES, 0, half[5:], bytes(16))
        )
    # A write that claims more than came with it.
    yield setup + record(
        MESSAGE, 0, uapi.VFIO_USER_REGION_WRITE, 0, struct.pack("<QII", 0, 0, 512) + bytes(8)
    )
    yield setup + record(BYTES, 0, HEADER.pack(7, 9, 32, 0, 0)) + record(PAUSE, b"\xff\x7f") + read
    yield (
        struct.pack("<H", OWN_CONFIG)
        + regions
        + _dma(message, 100, 0)
        + reset
        + record(PAUSE, b"\xe8\x03")
        + _dma(message, 100, 0)
        + record(ANSWER, 0xF0, bytes(5000))
        + record(ANSWER, 0, bytes(100))
    )
    # Interrupts by every action and kind of data: NONE, BOOL, EVENTFD by MASK, UNMASK, TRIGGER.
    for index in range(5):
        irqs = [
            record(
                MESSAGE,
                0x11 if kind == 4 else 0,
                uapi.VFIO_USER_DEVICE_SET_IRQS,
                0,
                struct.pack("<IIIII", 21, action | kind, index, 0, 1),
                b"\1" if kind == 2 else b"",
            )
            for action, kind in [(0x20, 4), *((a, k) for a in (0x08, 0x10, 0x20) for k in (1, 2)), (0x08, 4)]
        ]
        raised = record(DEVICE, 1, b"\1\0")
        yield setup + irqs[0] + raised + raised.join(irqs[1:]) + record(DEVICE, 1, b"\0\0") + reset
    # Configuration space beyond the registers: capabilities.
    access = [
        record(MESSAGE, 0, uapi.VFIO_USER_REGION_WRITE, 0, struct.pack("<QII", offset, 7, size), data[:size])
        for offset in range(0x40, 0xC0, 2)
        for size, data in ((2, b"\xff\x81"), (1, b"\1"))
    ]
    for at in range(0, len(access), 32):
        yield struct.pack("<H", P2P) + b"".join(access[at : at + 32])
    # Migration data in a window, accesses that come with a read of it, memory that the library serves.
    window = record(
        MESSAGE, SECOND_FILE, uapi.VFIO_USER_MIG_DATA_WINDOW, 0, struct.pack("<IIQ", 16, 0, 1 << 20)
    )
    accesses = b"".join(
        record(MESSAGE, 0, command, 0, struct.pack("<QII", offset, 2, 16), data)
        for offset in (0, 990, 4080)
        for command, data in ((uapi.VFIO_USER_REGION_WRITE, bytes(16)), (uapi.VFIO_USER_REGION_READ, b""))
    )
    for bits in (WINDOW, WINDOW | GATHER | FAILURES, ACCESSES, WINDOW | ACCESSES, WINDOW | ACCESSES | UNREAD):
        start = struct.pack("<H", OWN_CONFIG | P2P | PRE_COPY | MEMORY | bits) + window + accesses
        for first, second, command in (
            (DeviceState.PRE_COPY, DeviceState.STOP_COPY, uapi.VFIO_USER_MIG_DATA_READ),
            (DeviceState.STOP, DeviceState.RESUMING, uapi.VFIO_USER_MIG_DATA_WRITE),
        ):
            data = [
                record(MESSAGE, 0, command, 0, struct.pack("<IIQ", 16, size, offset))
                for size, offset in (
                    (100, 0),
                    (1000, (1 << 20) - 1000),
                    (1000, (1 << 20) - 999),
                    (1, 1 << 63),
                )
            ]
            yield start + _state(first) + data[0] + _state(second) + b"".join(data) + accesses
            yield start + _state(first) + _state(second) + data[0] + record(HANG_UP) + _state(first) + data[0]


def preload_inputs() -> Iterator[bytes]:
    """Yield inputs of the target `preload`: a program's steps (program.c), then the server's (server.c)."""
    arguments = {
        0: 4,
        1: 4,
        2: 3,
        3: 3,
        4: 1,
        5: 3,
        7: 1,
        8: 1,
        10: 2,
        11: 2,
        12: 2,
        15: 2,
        16: 1,
        17: 1,
        19: 2,
    }
    everything = bytes(
        [16, 1, 16, 5, 7, 6, 12, 0, 0, 10, 100, 1, 7, 3, 10, 100, 1, 7, 1, 7, 4, 11, 100, 0, 7, 2]
    )
    honest = record(0, 0)
    for policy in range(3):
        yield bytes([policy]) + record(0, everything)
        yield bytes([policy]) + record(
            0, bytes([13, 15, 0, 50, 14, 5, 0x24, 2, 9, 6, 3, 0, 0, 0, 0, 0, 6, 0, 0])
        )
    for what in range(7):
        yield bytes([0]) + record(0, bytes([16, 1, 19, what, what, 19, what, 6, 19, what, 5, 19, 1, 4]))
    yield bytes([0x80]) + record(0, bytes([1, 0, 4, 0, 0, 1, 0, 6, 0, 0, 0, 0, 4, 0, 0]))  # posted writes
    yield bytes([0]) + record(
        0, bytes([5, 0x14, 0, 1, 5, 0x0C, 0, 1, 5, 0x14, 0, 1])
    )  # INTx, and its resampler
    for step in range(21):
        yield bytes([0]) + record(0, bytes([step]) + bytes(arguments.get(step, 0)))
    # To the 17th request, which is about the size of the state: a reply that is longer than any.
    yield bytes([0]) + record(0, bytes([18])) + honest * 16 + record(1, 0, 0, bytes(4), bytes(600))
    ask = record(2, 0, 0, struct.pack("<II", 0x9000, 64)) + record(
        2, 1, 0, struct.pack("<II", 0x9000, 4), b"abcd"
    )
    # Migration data in a window, and what the server writes while DMA is logged.
    window = bytes([7, 6, 10, 100, 1, 10, 0, 16, 12, 0, 0, 7, 3, 10, 100, 1, 7, 1, 7, 4, 11, 100, 0, 7, 2])
    yield bytes([0x40]) + record(0, window)
    for count in range(18, 24):
        yield bytes([0x40]) + record(0, window) + honest * count + record(0, 0, struct.pack("<HB", 4, 0xFF))
        yield bytes([0x40]) + record(0, window) + honest * count + record(1, 0, 0x20, struct.pack("<I", 22))
    logged = bytes([16, 1, 13, 0, 0, 4, 0, 0, 0, 0, 4, 0, 0, 15, 0, 255, 15, 1, 3, 15, 0, 255, 14])
    for count in range(16, 24):
        yield bytes([0]) + record(0, logged) + honest * count + ask + ask
    for count in range(0, 24, 3):
        steps = record(0, everything)
        yield bytes([0]) + steps + honest * count + ask + record(1, 0, 0x20, struct.pack("<I", 22))
        yield bytes([0]) + steps + honest * count + record(0, 0, struct.pack("<HB", 4 * count, 0x81))
        yield bytes([0]) + steps + honest * count + record(3, 1, bytes(16)) + record(4)


def migration_inputs() -> Iterator[bytes]:
    """Yield inputs of the target `migration`: a byte of what the device has, then steps (migration.c)."""
    # PRE_COPY, sizes, reads, STOP_COPY, reads, STOP, RESUMING, writes, RUNNING; each arc's end is asked for.
    move = bytes([0x60, 0x07, 0x08, 0x64, 0x30, 0xA4, 0x64, 0x10, 0x40, 0x66, 0xF6, 0x20, 0x03, 0x09, 0x0B])
    for has in range(32):
        yield bytes([has]) + move
    for first in range(8):
        yield bytes([3]) + bytes([first << 4 | 0, 0x03, 0x0A, 0x03, 0x19, 0x20, 0x0C])


def dma_log_inputs() -> Iterator[bytes]:
    """Yield inputs of the target `dma-log`: steps with their numbers (dma_log.c)."""
    maps = bytes([0, 0, 255, 1, 0, 1, 15, 5, 0, 2, 3, 3, 0, 3, 10, 2 << 3])
    writes = bytes([7, 0, 3, 16, 0, 0, 32, 7, 1, 2, 0, 0, 100, 0, 7, 2, 0, 0, 0, 50, 0, 6, 2, 1, 0, 0, 99, 0])
    report = bytes([10, 0, 0, 255, 15, 0])
    for shift in (0, 12, 14, 21, 39):
        yield maps + bytes([4, shift]) + writes + report + report + bytes([5])
    yield maps + bytes([4, 12]) + writes + bytes([10, 1, 0, 7, 0, 1, 2, 0]) + report + bytes([3])
    yield maps + bytes([11, 1, 0, 2]) + writes + bytes([9, 0, 1, 1, 0, 1, 1, 11, 0]) + maps + report


def client_inputs(got: Frames) -> Iterator[bytes]:
    """Yield inputs of the target `client`."""
    session = []
    for message, fds in got:
        _, command, _, flags, error = HEADER.unpack_from(message)
        body = message[HEADER.size :]
        if flags & uapi.VFIO_USER_TYPE == uapi.VFIO_USER_REPLY:
            session.append((clientfuzz.REPLY, bytes([command, flags, error & 0xFF, fds]) + body))
        else:
            session.append((clientfuzz.REQUEST, bytes([command, 0]) + body))
    yield clientfuzz.join(session)
    ask = [
        (clientfuzz.REQUEST, bytes([command, 0]) + struct.pack("<QQ", address, count) + data)
        for command, address, count, data in [
            (11, clientfuzz.READABLE, 100, b""),
            (12, clientfuzz.WRITABLE, 8, bytes(8)),
            (12, clientfuzz.READABLE, 8, b"\xff" * 8),
            (11, clientfuzz.READABLE + 8000, 1000, b""),
            (11, 0, 1 << 40, b""),
        ]
    ]
    for at in range(3, len(session), 4):
        yield clientfuzz.join([*session[:at], *ask, *session[at:]])
        kind, body = session[at]
        yield clientfuzz.join([*session[:at], (kind, body[:-4]), *session[at + 1 :]])
        yield clientfuzz.join([*session[:at], (clientfuzz.BYTES, b"{}\n")])


def stream_inputs() -> Iterator[bytes]:
    """Yield inputs of the target `stream`."""
    for seed in (1, 2):
        data = filled(seed, pages=streamfuzz.SHAPE).save()
        for content in (data, version_1(data)):
            for flags in range(4):
                yield bytes([flags, seed]) + content
            # Another page than was sent, with checksums that are right.
            damaged = bytearray(content)
            damaged[len(content) // 2] ^= 1
            yield bytes([1, 0]) + damaged


def write(folder: Path) -> None:
    """Write the first inputs of each target to `folder`/TARGET."""
    with (
        tempfile.TemporaryDirectory() as short,
        server_farm(artifact("libvfio-user", build=True), Path(short)) as serve,
    ):
        sent, got = record_session(serve().socket)
    inputs = {
        "server": server_inputs(sent),
        "migration": migration_inputs(),
        "dma-log": dma_log_inputs(),
        "preload": preload_inputs(),
        "stream": stream_inputs(),
        "client": client_inputs(got),
    }
    for target in TARGETS:
        (folder / target).mkdir(parents=True)
        found = list(inputs[target])
        for number, content in enumerate(found):
            (folder / target / f"seed-{number:03}").write_bytes(content)
