"""Migration data: what a program reads and writes that migrates a device by hand."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable

import pytest
from inside import Served, inside
from vfio import (
    MIG_GET_PRECOPY_INFO,
    PATHS,
    PRE_COPY,
    PRE_COPY_P2P,
    PRECOPY_INFO_V2,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SET,
    STOP,
    STOP_COPY,
    Attached,
    Path,
    ioctl,
    precopy_info,
    refused,
)
from vfiodriver import MEMORY_BAR, Driver, until


def read_until(fd: int, end: str, size: int = 1 << 20) -> bytes:
    """Read until there is nothing more: for now (ENOMSG) or at all (an empty read)."""
    data = bytearray()
    while True:
        try:
            part = os.read(fd, size)
        except OSError as error:
            if end == errno.errorcode[error.errno or 0]:
                return bytes(data)
            raise
        if not part:
            assert end == "empty"
            return bytes(data)
        data += part


def write_all(fd: int, data: bytes, size: int = 32 << 10) -> None:
    """Write as QEMU's loader does: 32 KiB at a time."""
    for start in range(0, len(data), size):
        part = data[start : start + size]
        assert os.write(fd, part) == len(part)


@pytest.mark.parametrize("path", PATHS)
@inside()
def test_a_device_is_moved_by_hand(path: Path, served: Served) -> None:
    """PRE_COPY, read until ENOMSG, STOP_COPY, read to the end; written to another, it has the same memory."""
    source = Attached(path)
    destination = Attached(path, 1, beside=source)
    content = os.urandom(served.memory_bytes)
    source.device.write(MEMORY_BAR, 0, content)

    out = source.device.set_state(PRE_COPY)
    into = destination.device.set_state(RESUMING)
    write_all(into, read_until(out, "ENOMSG"))
    for page in (3, 99):
        changed = os.urandom(4096)
        source.device.write(MEMORY_BAR, page * 4096, changed)
        content = content[: page * 4096] + changed + content[(page + 1) * 4096 :]
    assert source.device.set_state(PRE_COPY_P2P) == -1
    write_all(into, read_until(out, "ENOMSG"))
    assert source.device.set_state(STOP_COPY) == -1
    write_all(into, read_until(out, "empty"))
    assert os.read(out, 10) == b""
    assert destination.device.set_state(RUNNING_P2P) == -1
    assert destination.device.set_state(RUNNING) == -1
    assert refused(os.write, into, b"more") == "ENODEV"
    assert destination.device.read(MEMORY_BAR, 0, served.memory_bytes) == content
    assert Driver(destination.device, served)["generation"] == 1


@inside()
def test_what_is_left_is_said_as_it_is_read(served: Served) -> None:
    """initial_bytes falls to zero and dirty_bytes rises and falls; bytes promised are bytes read."""
    device = Attached("iommufd-cdev").device
    driver = Driver(device, served)
    device.write(MEMORY_BAR, 0, os.urandom(served.memory_bytes))
    fd = device.set_state(PRE_COPY)
    flags, initial, dirty = precopy_info(fd)
    assert flags == 0
    assert initial > served.memory_bytes
    assert dirty == 0
    assert len(os.read(fd, 1000)) == 1000
    assert precopy_info(fd) == (0, initial - 1000, 0)
    assert len(read_until(fd, "ENOMSG", 5000)) == initial - 1000
    assert precopy_info(fd) == (0, 0, 0)
    driver["irq_raise"] = 0
    device.write(MEMORY_BAR, 0x5000, b"x")
    flags, initial, dirty = precopy_info(fd)
    assert (flags, initial) == (0, 0)
    assert 4096 < dirty < 8192
    assert device.data_size() > dirty
    assert len(read_until(fd, "ENOMSG")) == dirty


@inside()
def test_data_is_put_wherever_the_caller_wants_it(either_way: Served) -> None:
    """At any address, over the ends of pages, and not a byte beside it."""
    import ctypes
    import mmap

    source = Attached("iommufd-cdev")
    destination = Attached("iommufd-cdev", 1, beside=source)
    content = os.urandom(either_way.memory_bytes)
    source.device.write(MEMORY_BAR, 0, content)
    out = source.device.set_state(STOP_COPY)
    into = destination.device.set_state(RESUMING)
    room = 4 << 20
    buffer = mmap.mmap(-1, room)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    sizes = [1 << 20, 1, 4096, 5001, 70001]
    for number in range(1000):
        at, size = 4095 + 7 * number % 4096, sizes[number % len(sizes)]
        buffer[:] = bytes([0xA5]) * room
        count = libc.read(out, address + at, size)
        assert 0 <= count <= size, os.strerror(ctypes.get_errno())
        assert buffer[:at] == bytes([0xA5]) * at
        assert buffer[at + count :] == bytes([0xA5]) * (room - at - count)
        if count == 0:
            break
        write_all(into, buffer[at : at + count])
    assert number > 2
    assert destination.device.set_state(RUNNING) == -1
    assert destination.device.read(MEMORY_BAR, 0, either_way.memory_bytes) == content


@inside()
def test_a_buffer_that_is_not_there_is_an_error(either_way: Served) -> None:
    """EFAULT, wherever it ends and whether it may be read; the program lives on, and so does the device."""
    import ctypes
    import mmap
    import tempfile

    libc = ctypes.CDLL(None, use_errno=True)
    libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    buffer = mmap.mmap(-1, 8 * 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    device = Attached("iommufd-cdev").device
    for protection in (mmap.PROT_READ, 0):
        assert libc.mprotect(address + 4 * 4096, 4096, protection) == 0
        for begin, size in ((4 * 4096, 10), (4 * 4096 - 1, 2), (0, 8 * 4096), (1, 4 * 4096)):
            fd = device.set_state(PRE_COPY)
            assert libc.read(fd, address + begin, size) == -1, (protection, begin, size)
            assert ctypes.get_errno() == errno.EFAULT
            assert device.set_state(RUNNING) == -1
            os.close(fd)
    fd = device.set_state(PRE_COPY)
    assert libc.read(fd, address, 4 * 4096) == 4 * 4096
    assert libc.read(fd, 8, 4096) == -1
    assert ctypes.get_errno() == errno.EFAULT
    with tempfile.TemporaryFile() as file:
        file.truncate(8 * 4096)
        short = mmap.mmap(file.fileno(), 8 * 4096)
        file.truncate(4096)  # a store beyond it is SIGBUS now
        assert libc.read(fd, ctypes.addressof(ctypes.c_char.from_buffer(short)), 8 * 4096) == -1
        assert ctypes.get_errno() == errno.EFAULT


@inside()
def test_precopy_info_is_of_the_pre_copy_states(served: Served) -> None:
    """EINVAL in any other, and for a structure that is too short; ENOTTY for what can only be written."""
    device = Attached("iommufd-cdev").device
    fd = device.set_state(PRE_COPY)
    assert refused(precopy_info, fd, 16) == "EINVAL"
    assert ioctl(fd, MIG_GET_PRECOPY_INFO, "IIQQQ", 32, 0xFF, 0, 0, 7)[1] == 0  # flags are not echoed
    assert refused(ioctl, fd, 0x3B7A, "IIQQ", 24, 0, 0, 0) == "ENOTTY"
    device.set_state(PRE_COPY_P2P)
    assert precopy_info(fd)[1] > 0
    device.set_state(STOP_COPY)
    assert refused(precopy_info, fd) == "EINVAL"
    device.set_state(STOP)
    assert refused(precopy_info, fd) == "ENODEV"
    os.close(fd)
    fd = device.set_state(RESUMING)
    assert refused(precopy_info, fd) == "ENOTTY"
    assert refused(os.read, fd, 10) == "EBADF"
    assert refused(os.pread, fd, 10, 0) == "EINVAL"


@inside()
def test_reinit_is_reported_to_who_asked_for_it(served: Served) -> None:
    """VFIO_PRECOPY_INFO_REINIT needs the opt-in of Linux 7.1."""
    device = Attached("iommufd-cdev").device
    driver = Driver(device, served)
    device.write(MEMORY_BAR, 0, os.urandom(served.memory_bytes))
    for opted_in in (False, True):
        if opted_in:
            device.feature(SET | PRECOPY_INFO_V2)
        fd = device.set_state(PRE_COPY)
        read_until(fd, "ENOMSG")
        driver["reinit"] = 4
        flags, initial, dirty = precopy_info(fd)
        if opted_in:
            assert flags == 1
            assert initial > 4 * 4096
        else:
            assert (flags, initial) == (0, 0)
            assert dirty > 4 * 4096
        device.set_state(RUNNING)
        os.close(fd)


@inside()
def test_a_state_that_is_no_state_is_refused_and_the_device_can_be_reset(served: Served) -> None:
    """The write itself is taken: what came of it is said by the next one, or by the change of state."""
    device = Attached("iommufd-cdev").device
    fd = device.set_state(RESUMING)
    os.write(fd, b"no such thing" * 1000)

    def refuses() -> bool:
        return refused(os.write, fd, b"more") not in ("ok", "EBADF")

    until(refuses, "the refusal of the first write")
    assert refused(device.set_state, RUNNING) not in ("ok", "EBADF")
    device.reset()
    assert device.state() == RUNNING
    assert refused(os.write, fd, b"more") == "ENODEV"


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/stderr"})
def resume_in_small_pieces(served: Served) -> None:
    source = Attached("iommufd-cdev")
    destination = Attached("iommufd-cdev", 1, beside=source)
    source.device.write(MEMORY_BAR, 0, os.urandom(served.memory_bytes))
    out = source.device.set_state(PRE_COPY)
    source.device.set_state(STOP_COPY)
    data = read_until(out, "empty")
    into = destination.device.set_state(RESUMING)
    first = len(data) * 2 // 3  # less than the library collects before a write has to wait
    served.pause(1)  # a message is under way all the time then, however slow this program is
    try:
        write_all(into, data[:first], 500)
    finally:
        served.resume(1)
    write_all(into, data[first:], 500)
    destination.device.set_state(RUNNING)
    assert destination.device.read(MEMORY_BAR, 0, 4096) == source.device.read(MEMORY_BAR, 0, 4096)


def test_small_writes_are_collected_while_a_message_is_under_way(
    served: Served, run_inside: Callable[..., str]
) -> None:
    """Fewer messages than writes, none larger than the server takes, and all of the data in order."""
    said = run_inside(resume_in_small_pieces, served=served)
    sizes = [int(size) for size in re.findall(r"MIG_DATA_WRITE of (\d+) bytes: ok", said)]
    assert sum(sizes) > served.memory_bytes
    assert max(sizes) <= 1 << 20
    assert len(sizes) < sum(sizes) / 500 / 2


def test_data_is_in_a_window_where_the_server_takes_one(
    either_way: Served, request: pytest.FixtureRequest, run_inside: Callable[..., str]
) -> None:
    """On both sides. Without a window the same program moves the same data, so only the log tells."""
    said = run_inside(resume_in_small_pieces, served=either_way)
    answers = re.findall(r"device (\d): MIG_DATA_WINDOW of \d+ bytes: (\w+)", said)
    windowed = request.node.callspec.params["either_way"] == "window"
    assert sorted(answers) == ([("0", "ok"), ("1", "ok")] if windowed else [])


@inside()
def test_nothing_overtakes_data_that_was_written(served: Served) -> None:
    """While the server stands still, neither another request nor a message to somebody else gets by.

    The server stores pages as they arrive, so what a request reads tells which data came before it.
    """
    import socket
    import threading
    import time

    source = Attached("iommufd-cdev")
    destination = Attached("iommufd-cdev", 1, beside=source)
    page = os.urandom(4096)
    source.device.write(MEMORY_BAR, 0, page)
    assert destination.device.read(MEMORY_BAR, 0, 4096) != page
    data = os.read(source.device.set_state(PRE_COPY), 64 << 10)
    assert page in data[1000:]
    into = destination.device.set_state(RESUMING)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    sending, asking = threading.Event(), threading.Event()
    found = []

    def receiver() -> None:
        """QEMU's receiver: it writes data, and then says to the source that it has it."""
        os.write(into, data[1000:])
        sending.set()
        ours.sendmsg([b"ack"])

    def other() -> None:
        """Ask something else of the device."""
        asking.set()
        found.append(destination.device.read(MEMORY_BAR, 0, 4096))

    served.pause(1)
    try:
        os.write(into, data[:1000])
        time.sleep(0.3)  # so a message is under way, and what comes now waits for its answer
        receiving = threading.Thread(target=receiver)
        receiving.start()
        assert sending.wait(300)
        others = threading.Thread(target=other)
        others.start()
        assert asking.wait(300)
        time.sleep(0.3)  # for what would overtake; nothing that is asserted rests on either time
        assert refused(theirs.recv, 10) == "EAGAIN"
    finally:
        served.resume(1)
    receiving.join(300)
    others.join(300)
    assert theirs.recv(10) == b"ack"
    assert found == [page]
