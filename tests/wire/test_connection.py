"""The client's framing against a peer under the test's full control: a raw socket at the other end."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, receive_exactly

from vfu_dev import uapi
from vfu_dev.client import ClientCommandError, Connection, DisconnectedError, ReplyTimeoutError
from vfu_dev.client.dma import DmaSpace
from vfu_dev.client.frames import HEADER
from vfu_dev.errors import ProtocolError

# How long a client waits here for what never comes.
IMPATIENT_SECONDS = 0.3
RESET, READ = uapi.VFIO_USER_DEVICE_RESET, uapi.VFIO_USER_REGION_READ


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """Return a connection and the raw socket of its peer."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE_SECONDS)
    with theirs, Connection(ours, timeout_seconds=PATIENCE_SECONDS) as connection:
        yield connection, theirs


def receive(sock: socket.socket) -> tuple[int, int, int, bytes]:
    """Return id, command, flags and payload of one message."""
    number, command, size, flags, _ = HEADER.unpack(receive_exactly(sock, HEADER.size))
    return number, command, flags, receive_exactly(sock, size - HEADER.size)


def message(
    number: int, command: int, payload: bytes = b"", flags: int = uapi.VFIO_USER_REPLY, error: int = 0
) -> bytes:
    return HEADER.pack(number, command, HEADER.size + len(payload), flags, error) + payload


def test_replies_out_of_order_reach_their_callers(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    first = connection.submit(READ, b"one", reply_bytes=8)
    second = connection.submit(READ, b"two", reply_bytes=8)
    numbers = [receive(peer)[0], receive(peer)[0]]
    peer.sendall(message(numbers[1], READ, b"2") + message(numbers[0], READ, b"1"))
    assert bytes(connection.wait(first).payload) == b"1"
    assert bytes(connection.wait(second).payload) == b"2"


def test_threads_share_a_connection(pair: tuple[Connection, socket.socket]) -> None:
    """Each of many threads gets its own echo, whichever thread happens to read it off the socket."""
    connection, peer = pair
    threads, rounds = 8, 100
    wrong: list[object] = []

    def echo() -> None:
        for _ in range(threads * rounds):
            number, command, _, payload = receive(peer)
            peer.sendall(message(number, command, payload))

    def ask(thread: int) -> None:
        for turn in range(rounds):
            text = f"{thread}:{turn}".encode()
            if bytes(connection.call(READ, text, reply_bytes=16).payload) != text:
                wrong.append(text)

    workers = [
        threading.Thread(target=echo),
        *(threading.Thread(target=ask, args=(n,)) for n in range(threads)),
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=PATIENCE_SECONDS)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


def test_an_error_reply_carries_command_and_errno(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    call = connection.submit(RESET)
    number, *_ = receive(peer)
    peer.sendall(message(number, RESET, flags=uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR, error=errno.EBUSY))
    with pytest.raises(ClientCommandError, match="DEVICE_RESET") as caught:
        connection.wait(call)
    assert (caught.value.errno, caught.value.command) == (errno.EBUSY, RESET)


@pytest.mark.parametrize("given", [0, 4096, 1 << 31, (1 << 32) - 1])
def test_an_odd_errno_becomes_eio(pair: tuple[Connection, socket.socket], given: int) -> None:
    """The error field may be zero, says the specification, and a peer may put anything there."""
    connection, peer = pair
    call = connection.submit(RESET)
    number, *_ = receive(peer)
    peer.sendall(message(number, RESET, flags=uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR, error=given))
    with pytest.raises(ClientCommandError) as caught:
        connection.wait(call)
    assert (caught.value.errno, caught.value.given) == (errno.EIO, given)


def test_a_late_reply_is_dropped_and_the_connection_goes_on(pair: tuple[Connection, socket.socket]) -> None:
    """The buffer of the call that gave up is not written any more."""
    connection, peer = pair
    buffer = bytearray(8)
    call = connection.submit(READ, into=memoryview(buffer), timeout_seconds=IMPATIENT_SECONDS)
    number, *_ = receive(peer)
    with pytest.raises(ReplyTimeoutError, match="REGION_READ"):
        connection.wait(call)
    late = message(number, READ, b"too late")
    following = connection.submit(RESET)
    number, *_ = receive(peer)
    peer.sendall(late + message(number, RESET))
    connection.wait(following)
    assert buffer == bytes(8)


def test_silence_in_the_middle_of_a_message_ends_the_connection(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    call = connection.submit(READ, reply_bytes=8)
    connection.timeout_seconds = IMPATIENT_SECONDS  # of a message, once it has begun
    number, *_ = receive(peer)
    peer.sendall(message(number, READ, b"12345678")[:20])
    with pytest.raises(ReplyTimeoutError, match="middle of a message"):
        connection.wait(call)
    with pytest.raises(ReplyTimeoutError):
        connection.call(RESET)
    assert connection.closed


def test_a_reply_longer_than_its_room_ends_the_connection(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    call = connection.submit(READ, reply_bytes=4, into=memoryview(bytearray(4)))
    number, *_ = receive(peer)
    peer.sendall(message(number, READ, b"nine byte"))
    with pytest.raises(ProtocolError, match="9 bytes in reply to REGION_READ, with room for 8"):
        connection.wait(call)


def test_a_server_that_reads_nothing_is_a_timeout(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    with pytest.raises(ReplyTimeoutError, match="takes no messages"):
        connection.call(READ, bytes(8 << 20), timeout_seconds=IMPATIENT_SECONDS)


def test_closing_wakes_a_waiting_thread(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            connection.call(RESET)
        except DisconnectedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    receive(peer)
    connection.close()
    thread.join(timeout=PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert len(caught) == 1


def test_file_descriptors_arrive_and_uninvited_ones_are_closed(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, peer = pair
    before = len(os.listdir("/proc/self/fd"))
    call = connection.submit(READ, max_fds=2)
    number, *_ = receive(peer)
    with open("/dev/null", "rb") as null:
        socket.send_fds(peer, [message(number, READ)], [null.fileno(), null.fileno()])
        assert len(connection.wait(call).fds) == 2
        for fd in call.fds:
            os.close(fd)
        call = connection.submit(READ, max_fds=1)
        number, *_ = receive(peer)
        socket.send_fds(peer, [message(number, READ)], [null.fileno(), null.fileno()])
        with pytest.raises(ProtocolError, match="2 file descriptors"):
            connection.wait(call)
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the connection's own socket


READ_WRITE = uapi.VFIO_DMA_MAP_FLAG_READ | uapi.VFIO_DMA_MAP_FLAG_WRITE


@pytest.mark.parametrize(
    ("command", "payload", "expected"),
    [
        (uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 0x1004, 4), 0),
        (uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 0x1FFC, 4), 0),
        (uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 0x1FFD, 4), errno.EFAULT),
        (uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 0xFFF, 4), errno.EFAULT),
        (uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 1 << 63, 4), errno.EFAULT),
        (uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 0x1000, 1 << 63), errno.E2BIG),
        (uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 0x3000, 4), errno.EPERM),  # write-only
        (uapi.VFIO_USER_DMA_READ, b"short", errno.EINVAL),
        (uapi.VFIO_USER_DMA_WRITE, struct.pack("<QQ", 0x1004, 4) + b"data", 0),
        (uapi.VFIO_USER_DMA_WRITE, struct.pack("<QQ", 0x1004, 5) + b"data", errno.EINVAL),
        (uapi.VFIO_USER_DMA_WRITE, struct.pack("<QQ", 0x1004, 3) + b"data", errno.EINVAL),
        (uapi.VFIO_USER_DMA_WRITE, struct.pack("<QQ", 0x3000, 4) + b"data", 0),
        (uapi.VFIO_USER_DMA_WRITE, b"", errno.EINVAL),
        (uapi.VFIO_USER_VERSION, b"", errno.ENOSYS),
        (999, bytes(64), errno.ENOSYS),
    ],
)
def test_requests_of_the_server_are_answered_while_a_call_waits(
    pair: tuple[Connection, socket.socket], command: int, payload: bytes, expected: int
) -> None:
    """DMA_READ and DMA_WRITE reach exactly what is mapped, in the direction allowed; the rest is refused."""
    connection, peer = pair
    space = DmaSpace()
    space.regions[0x1000] = space.create(0x1000, 0x1000, READ_WRITE, shared=False)
    space.regions[0x3000] = space.create(0x3000, 0x1000, uapi.VFIO_DMA_MAP_FLAG_WRITE, shared=False)
    space.regions[0x1000].memory[:] = bytes(range(256)) * 16
    connection.handler = space.handle
    call = connection.submit(RESET)
    number, *_ = receive(peer)
    peer.sendall(message(0x77, command, payload, flags=0) + message(number, RESET))
    connection.wait(call)
    header = HEADER.unpack(receive_exactly(peer, HEADER.size))
    assert header[0:2] == (0x77, command)
    if expected:
        assert header[2:] == (HEADER.size, uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR, expected)
    elif command == uapi.VFIO_USER_DMA_READ:
        address, _ = struct.unpack("<QQ", payload)
        start = address - 0x1000
        assert peer.recv(64) == payload + bytes(range(256))[start % 256 :][:4]
    else:
        address, _ = struct.unpack_from("<QQ", payload)
        assert peer.recv(64) == payload[:16]
        region = space.regions[address & ~0xFFF]
        assert region.memory[address & 0xFFF :][:4] == b"data"
    space.close()


def test_sending_and_receiving_at_once_does_not_lock_up(pair: tuple[Connection, socket.socket]) -> None:
    """A server that is blocked on a long reply reads nothing: whoever sends then has to receive as well.

    The peer begins to read a message of 4 MiB, then sends a request of its own and a reply of 4 MiB before it
    reads on. Its request is answered behind the message that was under way.
    """
    connection, peer = pair
    connection.handler = DmaSpace().handle
    buffer, data = bytearray(4 << 20), b"\xa5" * (4 << 20)
    first = connection.submit(READ, into=memoryview(buffer))
    number, *_ = receive(peer)
    got: list[object] = []

    def serve() -> None:
        receive_exactly(peer, HEADER.size)
        peer.sendall(message(0x77, uapi.VFIO_USER_DMA_READ, struct.pack("<QQ", 0, 4), flags=0))
        peer.sendall(message(number, READ, b"\x5a" * len(buffer)))
        got.append(receive_exactly(peer, len(data)))
        got.append(receive(peer)[:3])

    thread = threading.Thread(target=serve)
    thread.start()
    connection.submit(READ, data)
    connection.wait(first)
    thread.join(timeout=PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert buffer == b"\x5a" * len(buffer)
    assert got == [data, (0x77, uapi.VFIO_USER_DMA_READ, uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR)]


def test_a_full_queue_is_waited_for(short_tmp: Path) -> None:
    """A server that is slow to accept is connected to when it does, within the client's patience."""
    path = short_tmp / "s"
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(Connection.connect(path, timeout_seconds=PATIENCE_SECONDS))
        with pytest.raises(DisconnectedError, match=r"its queue of clients was full for 0\.3 s"):
            Connection.connect(path, timeout_seconds=IMPATIENT_SECONDS)
        waiting = threading.Event()

        def connect() -> None:
            waiting.set()
            stack.enter_context(Connection.connect(path, timeout_seconds=PATIENCE_SECONDS))

        thread = threading.Thread(target=connect)
        thread.start()
        waiting.wait()
        stack.enter_context(listener.accept()[0])
        thread.join()
        stack.enter_context(listener.accept()[0])
