"""Clients that break the protocol: the server answers with an error or hangs up, and serves the next client.

One server takes all of it. Every test ends by attaching properly and reading the device's identification;
that the server stops cleanly and logged no traceback is checked at the end.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from serverkit import (
    PATIENCE_SECONDS,
    RunningServer,
    ServerFactory,
    receive_exactly,
    server_farm,
    short_folder,
    wait_until,
)

from vfu_dev import uapi
from vfu_dev.client.frames import HEADER
from vfu_dev.uapi import DeviceState

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
# What the library logs of a client that did not go on with its message for 5 s.
GAVE_UP = "Connection timed out"
COMMANDS = [*range(1, 20)]
NOISY_CLIENTS = 500


def frame(
    command: int,
    payload: bytes = b"",
    *,
    size: int | None = None,
    flags: int = 0,
    number: int = 7,
    error: int = 0,
) -> bytes:
    return (
        HEADER.pack(number, command, HEADER.size + len(payload) if size is None else size, flags, error)
        + payload
    )


VERSION = frame(uapi.VFIO_USER_VERSION, struct.pack("<HH", 0, 0))


@contextmanager
def raw(server: RunningServer, *, negotiate: bool = True) -> Iterator[socket.socket]:
    """A bare socket to the server, after a VERSION exchange unless told otherwise."""
    wait_until(lambda: not server.status()["connected"], "the server drops its last client")
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(str(server.socket))
        if negotiate:
            sock.sendall(VERSION)
            assert answer(sock) is not None
        yield sock


def answer(sock: socket.socket) -> tuple[int, int, int, bytes] | None:
    """Return (command, flags, error, payload) of the next reply, None when the server hung up."""
    try:
        header = receive_exactly(sock, HEADER.size)
        if len(header) < HEADER.size:
            return None
        _, command, size, flags, error = HEADER.unpack(header)
        payload = receive_exactly(sock, size - HEADER.size)
    except ConnectionError:
        return None
    return command, flags, error, payload


def is_refusal(reply: tuple[int, int, int, bytes] | None) -> bool:
    """Whether the server hung up or sent a well-formed error reply."""
    if reply is None:
        return True
    _, flags, error, payload = reply
    return flags == uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR and 0 < error < 4096 and payload == b""


def serves(server: RunningServer) -> None:
    """Attach as a good client does."""
    with server.connect() as device:
        assert device.region_read(0, 0, 4) == b"VFUD"
        assert device.migration.get_state() is DeviceState.RUNNING


# Bodies that fit no command they could be sent with, or that name lengths they do not have.
BODIES = {
    "empty": b"",
    "one byte": b"\0",
    "7 bytes": bytes(7),
    "15 bytes": bytes(15),
    "all ones": b"\xff" * 64,
    "argsz 0": struct.pack("<II", 0, 0),
    "argsz huge": struct.pack("<IIIIQQ", U32, 0, 0, 0, 0, 0),
    "count huge": struct.pack("<QII", 0, 2, U32),
    "count beyond the limit": struct.pack("<QII", 0, 2, (1 << 20) + 1),
    "offset and count wrap": struct.pack("<QII", U64 - 3, 2, 8),
    "region huge": struct.pack("<QII", 0, U32, 4),
    "one byte too long": bytes(33),
    "feature all bits": struct.pack("<IIQ", 16, U32, U64),
    "feature set and get": struct.pack("<IIII", 16, 0x30002, 2, 0),
    "feature set without data": struct.pack("<II", 8, 0x20002),
    "feature get state, argsz 0": struct.pack("<II", 0, 0x10002),
    "logging ranges huge": struct.pack("<IIQII", 24, 0x20006, 4096, U32, 0),
    "logging page size 0": struct.pack("<IIQIIQQ", 40, 0x20006, 0, 1, 0, 0, 4096),
    "logging report huge": struct.pack("<IIQQQ", U32, 0x10008, 0, U64, 4096),
    "logging report page size 3": struct.pack("<IIQQQ", 4096, 0x10008, 0, 1 << 20, 3),
    "data read huge": struct.pack("<II", U32, U32),
    "data write lies": struct.pack("<II", 4096, 4096) + bytes(16),
    "dma map 2^64": struct.pack("<IIQQQ", 32, 3, 0, 0, U64),
    "dma map wraps": struct.pack("<IIQQQ", 32, 3, 0, U64 - 4095, 1 << 20),
    "dma map offset": struct.pack("<IIQQQ", 32, 3, U64, 0, 4096),
    "dma unmap all ones": struct.pack("<IIQQ", 24, U32, U64, U64),
    "irqs count huge": struct.pack("<5I", 20, 0x21, 2, 0, U32),
    "irqs wrap": struct.pack("<5I", 20, 0x21, 2, U32, 2),
    "irqs all flags": struct.pack("<5I", 20, U32, 2, 0, 1),
    "irqs bool, no data": struct.pack("<5I", 20, 0x22, 2, 0, 4),
    "multi count huge": struct.pack("<Q", U64),
    "multi without writes": struct.pack("<Q", 3),
}


@pytest.fixture(scope="module")
def shared_server(library: Path) -> Iterator[RunningServer]:
    """Return one small server for the whole module: surviving is its job."""
    with short_folder() as folder, server_farm(library, folder) as serve:
        yield serve(memory="64K")


@pytest.mark.parametrize("command", [*COMMANDS, 0, 20, 99, 0xFFFF])
def test_every_command_with_every_bad_body(shared_server: RunningServer, command: int) -> None:
    """A reply or a hang-up to each, never silence; a success means that the body happened to be good."""
    for name, body in BODIES.items():
        with raw(shared_server) as sock:
            sock.sendall(frame(command, body))
            reply = answer(sock)
            assert reply is None or reply[0] == command, name
            assert is_refusal(reply) or (reply is not None and reply[1] == uapi.VFIO_USER_REPLY), name
            if command not in COMMANDS or command == uapi.VFIO_USER_VERSION:
                assert is_refusal(reply), name
    serves(shared_server)


@pytest.mark.parametrize(
    "data",
    [
        frame(uapi.VFIO_USER_DEVICE_RESET, size=0),
        frame(uapi.VFIO_USER_DEVICE_RESET, size=15),
        frame(uapi.VFIO_USER_REGION_WRITE, size=U32),
        frame(uapi.VFIO_USER_MIG_DATA_WRITE, bytes(64), size=1 << 31),
        frame(uapi.VFIO_USER_DEVICE_RESET, flags=0x7),
        frame(uapi.VFIO_USER_DEVICE_RESET, flags=U32),
        frame(uapi.VFIO_USER_DEVICE_RESET, flags=uapi.VFIO_USER_REPLY),  # a reply to nothing
        frame(uapi.VFIO_USER_DMA_READ, bytes(16), flags=uapi.VFIO_USER_REPLY),
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda data: data[:16].hex(),
)
@pytest.mark.parametrize("negotiate", [True, False], ids=["negotiated", "first"])
def test_a_bad_frame_is_the_end_of_that_client_only(
    shared_server: RunningServer, data: bytes, negotiate: bool
) -> None:
    with raw(shared_server, negotiate=negotiate) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while (reply := answer(sock)) is not None:
            assert is_refusal(reply)
    serves(shared_server)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != uapi.VFIO_USER_VERSION])
def test_nothing_works_before_the_version_exchange(shared_server: RunningServer, command: int) -> None:
    with raw(shared_server, negotiate=False) as sock:
        sock.sendall(frame(command, bytes(32)))
        assert is_refusal(answer(sock))
    serves(shared_server)


@pytest.mark.parametrize("count", [1, 8, 15, 16, 20, 100])
def test_a_client_that_dies_in_a_message(serve: ServerFactory, count: int) -> None:
    """Half a header, a header alone, half a body: the server sees the end, and does not wait for the rest."""
    server = serve("--log-level", "debug", memory="64K")
    message = frame(uapi.VFIO_USER_REGION_WRITE, struct.pack("<QII", 0, 2, 4096) + bytes(4096))
    with raw(server) as sock:
        sock.sendall(message[:count])
    serves(server)
    assert GAVE_UP not in server.log()


@pytest.mark.parametrize("count", [8, 20])
def test_a_client_that_falls_silent_in_a_message_is_dropped(serve: ServerFactory, count: int) -> None:
    """It cannot hold the server for ever: the server gives up on it, and serves the next client."""
    server = serve("--log-level", "debug", memory="64K")
    message = frame(uapi.VFIO_USER_REGION_WRITE, struct.pack("<QII", 0, 2, 4096) + bytes(4096))
    with raw(server) as sock:
        sock.sendall(message[:count])
        assert answer(sock) is None
    assert GAVE_UP in server.log()
    serves(server)


def test_a_client_that_reads_no_replies_is_dropped(shared_server: RunningServer) -> None:
    """Replies that nobody takes fill the socket; the server gives up on that client, not on its work."""
    with raw(shared_server) as sock:
        sock.setblocking(False)
        request = frame(uapi.VFIO_USER_REGION_READ, struct.pack("<QII", 0, 2, 65536))
        ends = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < ends:
            try:
                sock.sendall(request * 64)
            except BlockingIOError:
                time.sleep(0.05)
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            pytest.fail("the server went on waiting for the client")
    serves(shared_server)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("count", [1, 17, 200])
def test_uninvited_file_descriptors_are_closed(
    shared_server: RunningServer, command: int, count: int
) -> None:
    """Whatever they come with and however many: the server holds no more of them afterwards."""
    folder = f"/proc/{shared_server.process.pid}/fd"
    with raw(shared_server):
        pass
    serves(shared_server)
    wait_until(lambda: not shared_server.status()["connected"], "the last client is gone")
    before = len(os.listdir(folder))
    with open("/dev/null", "rb") as null, raw(shared_server) as sock:
        socket.send_fds(sock, [frame(command, bytes(32))], [null.fileno()] * count)
        sock.shutdown(socket.SHUT_WR)
        while answer(sock) is not None:
            pass
    serves(shared_server)
    wait_until(lambda: not shared_server.status()["connected"], "the last client is gone")
    wait_until(
        lambda: len(os.listdir(folder)) <= before, f"{count} descriptors with command {command} are closed"
    )


def test_a_body_larger_than_the_socket_buffer_arrives_whole(shared_server: RunningServer) -> None:
    """1 MiB in pieces with pauses between them is one message: one recv() does not return all of it."""
    chance = random.Random(2)
    data = chance.randbytes(1 << 20)
    with raw(shared_server) as sock:
        set_state = struct.pack("<IIII", 16, 0x20002, DeviceState.RESUMING, U32)
        sock.sendall(frame(uapi.VFIO_USER_DEVICE_FEATURE, set_state))
        assert answer(sock) is not None
        message = frame(uapi.VFIO_USER_MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)) + data)
        while message:
            count = chance.randrange(1, 200_000)
            sock.sendall(message[:count])
            message = message[count:]
            time.sleep(0.002)
        assert is_refusal(answer(sock))  # noise is no stream, but the message was one
        sock.sendall(frame(uapi.VFIO_USER_DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0)))
        reply = answer(sock)
        assert reply is not None
        assert reply[:3] == (uapi.VFIO_USER_DEVICE_GET_INFO, uapi.VFIO_USER_REPLY, 0)
    serves(shared_server)


def test_many_requests_in_one_send_are_answered_in_order(shared_server: RunningServer) -> None:
    with raw(shared_server) as sock:
        read = struct.pack("<QII", 0, 0, 4)
        sock.sendall(b"".join(frame(uapi.VFIO_USER_REGION_READ, read, number=n) for n in range(100)))
        for number in range(100):
            header = HEADER.unpack(receive_exactly(sock, HEADER.size))
            assert header[0] == number
            assert receive_exactly(sock, 20)[16:] == b"VFUD"


def test_migration_data_too_long_for_the_limit_is_refused(shared_server: RunningServer) -> None:
    """`size` above max_data_xfer_size, read or written, is refused before anything is allocated for it."""
    with shared_server.connect() as device:
        limit = device.version.max_data_xfer_size
    with raw(shared_server) as sock:
        set_state = struct.pack("<IIII", 16, 0x20002, DeviceState.STOP_COPY, U32)
        sock.sendall(frame(uapi.VFIO_USER_DEVICE_FEATURE, set_state))
        assert answer(sock) is not None
        sock.sendall(frame(uapi.VFIO_USER_MIG_DATA_READ, struct.pack("<II", 9 + limit, limit + 1)))
        reply = answer(sock)
        assert reply is not None
        assert is_refusal(reply)
        assert reply[2] in (errno.EINVAL, errno.E2BIG)
    serves(shared_server)


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_and_random_changes(shared_server: RunningServer, seed: int) -> None:
    """Seeded noise of many clients: whole messages with random fields, flipped bits, random cuts."""
    chance = random.Random(seed)
    good = [
        frame(uapi.VFIO_USER_DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0)),
        frame(uapi.VFIO_USER_DEVICE_GET_REGION_INFO, struct.pack("<4IQQ", 64, 0, 2, 0, 0, 0)),
        frame(uapi.VFIO_USER_DEVICE_GET_IRQ_INFO, struct.pack("<4I", 16, 0, 2, 0)),
        frame(uapi.VFIO_USER_DEVICE_SET_IRQS, struct.pack("<5I", 20, 0x21, 2, 0, 1)),
        frame(uapi.VFIO_USER_REGION_READ, struct.pack("<QII", 0, 0, 4)),
        frame(uapi.VFIO_USER_REGION_WRITE, struct.pack("<QII", 64, 2, 8) + bytes(8)),
        frame(uapi.VFIO_USER_DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0x1000, 0x1000)),
        frame(uapi.VFIO_USER_DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0x1000, 0x1000)),
        frame(uapi.VFIO_USER_DEVICE_FEATURE, struct.pack("<IIII", 16, 0x20002, 6, 0)),
        frame(uapi.VFIO_USER_DEVICE_FEATURE, struct.pack("<IIII", 16, 0x20002, 4, 0)),
        frame(uapi.VFIO_USER_DEVICE_FEATURE, struct.pack("<IIQ", 16, 0x10009, 0)),
        frame(uapi.VFIO_USER_DEVICE_FEATURE, struct.pack("<IIQIIQQ", 40, 0x20006, 4096, 1, 0, 0, 4096)),
        frame(uapi.VFIO_USER_DEVICE_FEATURE, struct.pack("<IIQQQ", 4096, 0x10008, 0, 1 << 20, 4096)),
        frame(uapi.VFIO_USER_MIG_DATA_READ, struct.pack("<II", 4104, 4096)),
        frame(uapi.VFIO_USER_MIG_DATA_WRITE, struct.pack("<II", 72, 64) + bytes(64)),
        frame(uapi.VFIO_USER_MIG_GET_PRECOPY_INFO, struct.pack("<IIQQ", 24, 0, 0, 0)),
        frame(uapi.VFIO_USER_DEVICE_RESET),
    ]
    for _ in range(NOISY_CLIENTS):
        with raw(shared_server, negotiate=chance.random() < 0.9) as sock:
            try:
                for _ in range(chance.randrange(1, 40)):
                    message = bytearray(chance.choice(good))
                    for _ in range(chance.choice([0, 1, 1, 2, 8])):
                        # Mostly the body: a changed size only makes the server wait for the rest.
                        start = HEADER.size if len(message) > HEADER.size and chance.random() < 0.95 else 0
                        place = chance.randrange(start, len(message))
                        message[place] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
                    if chance.random() < 0.02:
                        message = bytearray(chance.randbytes(chance.randrange(200)))
                    sock.sendall(message)
            except ConnectionError:
                pass  # the server had enough of it
            sock.shutdown(socket.SHUT_WR)
            while answer(sock) is not None:
                pass
    serves(shared_server)
