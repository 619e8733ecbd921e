"""A client that is silent, slow or stuck holds up nobody else: the control socket, probes, other clients.

How fast an answer comes is nobody's promise here. What is shown is the order: others are answered while the
stuck client is still waited for, which the server does for some seconds before it drops it.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from dmakit import MIB, Driver
from serverkit import PATIENCE_SECONDS, RunningServer, ServerFactory, receive_exactly, wait_until

from vfu_dev import uapi
from vfu_dev.bench.peers import free_port
from vfu_dev.client import ClientCommandError, VfioUserDevice, messages
from vfu_dev.client.frames import Buffer
from vfu_dev.device.reference.layout import Op, Status

HEADER = uapi.VFIO_USER_HEADER
BAR2 = uapi.VFIO_PCI_BAR2_REGION_INDEX


def frame(command: int, payload: bytes, number: int = 1) -> bytes:
    return HEADER.pack(number, command, HEADER.size + len(payload), 0, 0) + payload


VERSION = frame(uapi.VFIO_USER_VERSION, struct.pack("<HH", 0, 0))
INFO = frame(uapi.VFIO_USER_DEVICE_GET_INFO, messages.DEVICE_INFO.pack(16, 0, 0, 0))
READ = frame(uapi.VFIO_USER_REGION_READ, messages.REGION_ACCESS.pack(0, BAR2, MIB))
Connect = Callable[[], socket.socket]


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Connect]:
    """Return a function that connects a raw socket, which says nothing by itself."""
    with ExitStack() as stack:

        def connect() -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(PATIENCE_SECONDS)
            sock.connect(os.fspath(server.socket))
            return sock

        yield connect


def attached(connect: Connect) -> socket.socket:
    sock = connect()
    sock.sendall(VERSION)
    size = HEADER.unpack(receive_exactly(sock, HEADER.size))[2]
    receive_exactly(sock, size - HEADER.size)
    return sock


def lines(path: str) -> int:
    return len(Path(path).read_text().splitlines())


def is_open(sock: socket.socket) -> bool:
    """Return whether the server still has its end."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return not poll.poll(0)


BEFORE_ATTACHING = {
    "silent": b"",
    "half a header": VERSION[:7],
    "a header alone": VERSION[: HEADER.size],
    "half a body": VERSION[:-1],
}
ATTACHED = {
    "half a header": INFO[:7],
    "a header alone": INFO[: HEADER.size],
    "half a body": INFO[:-1],
    "replies not read": READ * 4,
}


@pytest.mark.parametrize("said", BEFORE_ATTACHING.values(), ids=BEFORE_ATTACHING)
def test_who_connects_and_does_not_say_version_is_not_waited_for(
    server: RunningServer, connect: Connect, said: bytes
) -> None:
    """Control is answered, and a real client let in, while three such connections stand open."""
    stuck = [connect() for _ in range(3)]
    for sock in stuck:
        sock.sendall(said)
    assert not server.status()["connected"]
    with server.connect() as device:
        assert device.info().resettable
        assert server.status()["connected"]
        # While a client is attached the server closes their connections: none of them can become the client.
        for sock in stuck:
            assert sock.recv(1) == b""
        assert device.info().resettable
    # In this order, whenever this process came to look: all three stood open when the client was let in.
    log = server.log()
    assert log.index("a client is connected") < log.index("it sent no complete VERSION message")


@pytest.mark.parametrize("said", ATTACHED.values(), ids=ATTACHED)
def test_a_client_stuck_in_a_message_holds_up_nobody(
    server: RunningServer, connect: Connect, said: bytes
) -> None:
    """Control is answered and a second client told while the stuck one is attached; then it is dropped."""
    sock = attached(connect)
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(PATIENCE_SECONDS)
        control.connect(os.fspath(server.control_path))
        # All of it is there when the server looks: its patience begins then, however busy this process is.
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            sock.sendall(said)
            second = connect()
            second.sendall(VERSION)
            control.sendall(b'{"command": "status"}\n' * 3)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        with control.makefile("rb") as answers:
            assert all(json.loads(answers.readline())["result"]["connected"] for _ in range(3))
    *_, flags, error = HEADER.unpack(receive_exactly(second, HEADER.size))
    assert flags & uapi.VFIO_USER_ERROR
    assert error == errno.EBUSY
    wait_until(lambda: not server.status()["connected"], "the stuck client is dropped")
    log = server.log()
    refused, dropped = "another one is attached (EBUSY)", "dropping the connection: Connection timed out"
    assert log.index(refused) < log.index(dropped)
    with server.connect() as device:
        assert device.info().resettable


def test_replies_that_wait_come_whole_and_in_order(server: RunningServer, connect: Connect) -> None:
    """A client may ask for more than its socket holds, and read later."""
    with server.connect() as device:
        memory = device.region_read(BAR2, 0, MIB)
    sock = attached(connect)
    for number in range(5):
        sock.sendall(frame(uapi.VFIO_USER_REGION_READ, messages.REGION_ACCESS.pack(0, BAR2, MIB), number))
    sock.sendall(frame(uapi.VFIO_USER_DEVICE_GET_INFO, messages.DEVICE_INFO.pack(16, 0, 0, 0), 5))
    assert server.status()["connected"]
    for number in range(5):
        answer = HEADER.unpack(receive_exactly(sock, HEADER.size))
        assert answer[:2] == (number, uapi.VFIO_USER_REGION_READ)
        body = receive_exactly(sock, answer[2] - HEADER.size)
        assert body[messages.REGION_ACCESS.size :] == memory
        assert server.status()["connected"]
    assert HEADER.unpack(receive_exactly(sock, HEADER.size))[:2] == (5, uapi.VFIO_USER_DEVICE_GET_INFO)


def test_a_probe_is_answered_while_a_client_is_stuck(serve: ServerFactory) -> None:
    """/healthz is what Kubernetes restarts a pod by."""
    port = free_port()
    server = serve("--metrics-port", str(port))
    url = f"http://127.0.0.1:{port}/healthz"
    with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer:  # the exporter has started
        assert answer.read() == b"ok\n"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(os.fspath(server.socket))
        sock.sendall(VERSION)
        size = HEADER.unpack(receive_exactly(sock, HEADER.size))[2]
        receive_exactly(sock, size - HEADER.size)
        sock.sendall(INFO[:-1])
        with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer:
            assert answer.read() == b"ok\n"
        assert is_open(sock)


def test_a_client_that_does_not_answer_dma_holds_up_nobody(server: RunningServer) -> None:
    """Control is answered between the device's DMA_READ and the client's reply."""
    seen: list[bool] = []
    with server.connect() as device:
        device.dma_map(0x10000, 64 << 10)
        region = device.dma_map(0x100000, MIB, shared=False)
        region.memory[:4] = b"abcd"
        driver = Driver(device)
        answer = device.dma.handle

        def late(command: int, payload: memoryview) -> tuple[Buffer, ...]:
            seen.extend(server.status()["connected"] for _ in range(3))
            with pytest.raises(ClientCommandError, match="busy with another client"):
                VfioUserDevice.connect(server.socket, timeout_seconds=PATIENCE_SECONDS)
            return answer(command, payload)

        device.connection.handler = late
        done = driver.one(Op.TO_DEVICE, address=0x100000, length=4)
        assert done.status is Status.DONE
        assert device.region_read(BAR2, 0, 4) == b"abcd"
    assert seen
    assert all(seen)


def test_no_free_descriptor_costs_one_request(server: RunningServer) -> None:
    """EMFILE is the answer, and in the log; the connection lives, and the next request is served."""
    with server.connect() as device:
        pid = server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
        with pytest.raises(ClientCommandError) as caught:
            device.dma_map(0x100000, MIB)
        assert caught.value.errno == errno.EMFILE
        assert device.info().resettable
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        device.dma_map(0x100000, MIB)
    assert "no file descriptor is free" in server.log()


def test_many_mappings_of_one_file_need_no_descriptors(server: RunningServer) -> None:
    """Far more regions than descriptors, each with its own part of the file."""
    count, page = 3000, 4096
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, count * page)
    os.pwrite(fd, b"last", (count - 1) * page)
    with server.connect() as device:
        pid = server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 8, before[1]))
        device.dma_map(0x10000, 64 << 10)
        maps = lines(f"/proc/{pid}/maps")
        base = 1 << 32
        flags = uapi.VFIO_DMA_MAP_FLAG_READ | uapi.VFIO_DMA_MAP_FLAG_WRITE
        for number in range(count):
            request = messages.DMA_MAP.pack(
                messages.DMA_MAP.size, flags, number * page, base + 2 * number * page, page
            )
            device.connection.call(uapi.VFIO_USER_DMA_MAP, request, fds=(fd,))
        assert len(os.listdir(f"/proc/{pid}/fd")) <= used + 1
        assert lines(f"/proc/{pid}/maps") < maps + 64
        with pytest.raises(ClientCommandError) as caught:
            device.connection.call(uapi.VFIO_USER_DMA_MAP, request, fds=(fd,))
        assert caught.value.errno == errno.EEXIST
        done = Driver(device).one(Op.TO_DEVICE, address=base + 2 * (count - 1) * page, length=4)
        assert done.status is Status.DONE
        assert device.region_read(BAR2, 0, 4) == b"last"
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    os.close(fd)
