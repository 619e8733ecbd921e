"""docs/cloud-hypervisor.md: what that client sends and how it reads, imitated, and what comes of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from pagekit import ROOT
from serverkit import PATIENCE_SECONDS, RunningServer, ServerFactory

from vfu_dev import uapi

PAGE = ROOT / "docs" / "cloud-hypervisor.md"
HEADER = struct.Struct("<HHIII")  # id, command, size, flags, error
REGION_INFO = struct.Struct("<IIIIQQ")
WORDS = struct.Struct("<IIII")
ERROR_REPLY = uapi.VFIO_USER_REPLY | uapi.VFIO_USER_ERROR
EVENTFDS = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
RESETTABLE, PCI = 1 << 0, 1 << 1  # VFIO_DEVICE_FLAGS_*
MANY = """
from vfu_dev.device import Device, Msix, PciIdentity, Region

class Many(Device):
    identity = PciIdentity(vendor=0x4656, device=0x0101, class_code=0xFF0000, revision=1)
    buffer = Region(2, size_bytes=64 << 10)
    msix = Msix(4, vectors=40)
"""


class CloudHypervisor:
    """The client of the crate vfio_user, as in 2026: one request at a time, replies read by fixed sizes.

    It looks at no flags: an error reply is read as if it was the reply that it waits for.
    """

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(str(path))
        self._next_id = 0

    def __enter__(self) -> CloudHypervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, command: int, body: bytes, fds: Sequence[int] = ()) -> None:
        """Send a request."""
        message = HEADER.pack(self._next_id, command, HEADER.size + len(body), 0, 0) + body
        self._next_id += 1
        socket.send_fds(self.socket, [message], list(fds)) if fds else self.socket.sendall(message)

    def read(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises: EOFError, with what came."""
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError(data)
            data += piece
        return data

    def ask(self, command: int, body: bytes, reply_bytes: int, fds: Sequence[int] = ()) -> bytes:
        """Send a request and return as many bytes of payload as its reply should have."""
        self.send(command, body, fds)
        return self.read(HEADER.size + reply_bytes)[HEADER.size :]

    def negotiate(self) -> dict[str, object]:
        """VERSION; return the server's capabilities."""
        proposed = {"max_msg_fds": 1, "max_data_xfer_size": 1048576, "migration": {"pgsize": 4096}}
        text = json.dumps({"capabilities": proposed}, separators=(",", ":")).encode()
        self.send(uapi.VFIO_USER_VERSION, struct.pack("<HH", 0, 1) + text + b"\0")
        head = self.read(HEADER.size + 4)
        data = self.read(HEADER.unpack_from(head)[2] - len(head))
        return dict(json.loads(data[:-1])["capabilities"])

    def region(self, index: int) -> tuple[tuple[int, ...], list[int]]:
        """DEVICE_GET_REGION_INFO, with capabilities if there are some; return the structure and the fds."""
        argsz = REGION_INFO.size
        while True:
            self.send(uapi.VFIO_USER_DEVICE_GET_REGION_INFO, REGION_INFO.pack(argsz, 0, index, 0, 0, 0))
            data, fds, _, _ = socket.recv_fds(self.socket, HEADER.size + REGION_INFO.size, 1)
            info = REGION_INFO.unpack_from(data, HEADER.size)
            if info[0] <= argsz:
                assert len(self.read(HEADER.unpack_from(data)[2] - len(data))) == argsz - REGION_INFO.size
                return info, fds
            for fd in fds:
                os.close(fd)
            argsz = info[0]

    def enable_irqs(self, index: int, count: int) -> list[int]:
        """DEVICE_SET_IRQS, at most 16 eventfds a message, whatever the server's max_msg_fds."""
        eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        for start in range(0, count, 16):
            some = eventfds[start : start + 16]
            body = struct.pack("<IIIII", 20, EVENTFDS, index, start, len(some))
            self.send(uapi.VFIO_USER_DEVICE_SET_IRQS, body, some)
            assert HEADER.unpack(self.read(HEADER.size))[3:] == (uapi.VFIO_USER_REPLY, 0)
        return eventfds


def attach(client: CloudHypervisor) -> None:
    """What Cloud Hypervisor does when the VM starts."""
    client.negotiate()
    words = WORDS.unpack(client.ask(uapi.VFIO_USER_DEVICE_GET_INFO, WORDS.pack(32, 0, 0, 0), WORDS.size))
    for index in range(words[2]):
        for fd in client.region(index)[1]:
            os.close(fd)


def map_memory(client: CloudHypervisor, iova: int, size: int) -> int:
    """DMA_MAP of guest memory; return its fd."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    client.ask(uapi.VFIO_USER_DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, iova, size), 0, [fd])
    return fd


def test_the_device_of_the_page_attaches(serve: ServerFactory) -> None:
    """With the page's options: identity, every region, interrupts, and memory that the server has mapped."""
    (line,) = re.findall(r"^vfu-dev serve --socket \S+ (.*) &$", PAGE.read_text(), re.MULTILINE)
    server = serve(*shlex.split(line), memory=None)
    with CloudHypervisor(server.socket) as client:
        capabilities = client.negotiate()
        assert set(capabilities) == {"max_msg_fds", "max_data_xfer_size", "migration"}
        answer = client.ask(uapi.VFIO_USER_DEVICE_GET_INFO, WORDS.pack(32, 0, 0, 0), WORDS.size)
        _, flags, regions, irqs = WORDS.unpack(answer)
        assert flags == PCI | RESETTABLE
        assert regions == 9
        infos = [client.region(index) for index in range(regions)]
        bar2, fds = infos[2]
        assert bar2[1] & uapi.VFIO_REGION_INFO_FLAG_MMAP
        assert len(fds) == 1
        assert os.fstat(fds[0]).st_size >= bar2[4]
        for fd in fds:
            os.close(fd)
        config = client.ask(uapi.VFIO_USER_REGION_READ, struct.pack("<QII", 0, 7, 4), 20)
        assert config[16:] == struct.pack("<HH", 0x4656, 0x4455)
        for index in range(irqs):
            words = client.ask(uapi.VFIO_USER_DEVICE_GET_IRQ_INFO, WORDS.pack(16, 0, index, 0), WORDS.size)
            assert WORDS.unpack(words)[2] == index
        os.close(map_memory(client, 0, 1 << 20))
        for fd in client.enable_irqs(2, 4):
            os.close(fd)
        unmapped = client.ask(uapi.VFIO_USER_DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0, 1 << 20), 24)
        assert struct.unpack("<IIQQ", unmapped)[2:] == (0, 1 << 20)


def test_sixteen_descriptors_in_a_message(serve: ServerFactory, tmp_path: Path) -> None:
    """More than the server's max_msg_fds: a device with 40 vectors gets all of them."""
    (tmp_path / "many.py").write_text(MANY)
    server = serve("--device", f"{tmp_path / 'many.py'}:Many", memory=None)
    with CloudHypervisor(server.socket) as client:
        limit = client.negotiate()["max_msg_fds"]
        assert isinstance(limit, int)
        assert limit < 16
        eventfds = client.enable_irqs(2, 40)
        body = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        for number in (0, 15, 16, 39):
            client.ask(uapi.VFIO_USER_DEVICE_SET_IRQS, struct.pack("<IIIII", 20, body, 2, number, 1), 0)
        raised = [number for number, fd in enumerate(eventfds) if _count(fd)]
        assert raised == [0, 15, 16, 39]
        for fd in eventfds:
            os.close(fd)


def _count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def test_an_error_reply_is_shorter_than_what_the_client_waits_for(serve: ServerFactory) -> None:
    """The client would wait for 20 bytes more, for ever: the page says to arm no such fault."""
    with CloudHypervisor(serve("--fault", "op=region-read,error=EIO,count=1").socket) as client:
        client.negotiate()
        client.send(uapi.VFIO_USER_REGION_READ, struct.pack("<QII", 0, 0, 4))
        head = HEADER.unpack(client.read(HEADER.size))
        assert head[2:4] == (HEADER.size, ERROR_REPLY)
        client.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.socket.recv(1)


def test_a_refused_client_fails_at_once(serve: ServerFactory) -> None:
    """The second one on a socket, and one that cannot migrate where that is required: an end of file."""
    server, strict = serve(), serve("--require-migration")
    with CloudHypervisor(server.socket) as first:
        attach(first)
        for path in (server.socket, strict.socket):
            with CloudHypervisor(path) as refused, pytest.raises(EOFError):
                refused.negotiate()
        attached_still = first.ask(uapi.VFIO_USER_REGION_READ, struct.pack("<QII", 0, 7, 4), 20)
        assert attached_still[16:18] == struct.pack("<H", 0x4656)


def test_nothing_of_the_device_migrates(serve: ServerFactory) -> None:
    """What it sends when a VM is saved or moved away are its closing messages: no state is read."""
    server: RunningServer = serve("--fill", "1")
    with CloudHypervisor(server.socket) as client:
        attach(client)
        off = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        client.ask(uapi.VFIO_USER_DEVICE_SET_IRQS, struct.pack("<IIIII", 20, off, 2, 0, 0), 0)
        client.socket.shutdown(socket.SHUT_RDWR)
    status = server.status()
    assert (status["state"], status["save"]) == ("RUNNING", None)
    assert "gives no sign that it can migrate the device" in server.log()
