"""The window for migration data: a move through it, what is refused, and who is served meanwhile."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest
from serverkit import RunningServer, ServerFactory, wait_until
from streamkit import read_all, resume, save

from vfu_dev import uapi
from vfu_dev.client import ClientCommandError, Migrator, VfioUserDevice, messages
from vfu_dev.client.window import F_ADD_SEALS, SEALS, DataWindow, Place, sealed_memory
from vfu_dev.server.setup import MAX_WINDOW_BYTES
from vfu_dev.uapi import DeviceState

S = DeviceState
BAR2 = 2
MIB = 1 << 20
F_SEAL_WRITE = 0x0008  # <linux/fcntl.h>


@pytest.fixture
def windowed(device: VfioUserDevice) -> VfioUserDevice:
    """Return a client that has a window of 2 MiB."""
    assert device.migration.share(DataWindow(2 * MIB))
    return device


def ask_window(device: VfioUserDevice, size: int, *fds: int, flags: int = 0) -> int:
    """Hand over a window; return the errno of the reply, 0 if it was taken."""
    request = messages.MIG_DATA_WINDOW.pack(messages.MIG_DATA_WINDOW.size, flags, size)
    try:
        device.connection.call(uapi.VFIO_USER_MIG_DATA_WINDOW, request, fds=fds)
    except ClientCommandError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("access", ["trap", "mmap"])
def test_a_move_through_a_window_copies_nothing_and_is_equal(serve: ServerFactory, access: str) -> None:
    """Both servers have the same memory: the bytes that one stores are those that the other takes."""
    servers = serve("--fill", "7", "--access", access), serve("--access", access)
    with servers[0].connect() as source, servers[1].connect() as target:
        Migrator(source, target).run()
        assert source.migration.window is not None
        assert source.migration.window is target.migration.window
        assert source.region_read(BAR2, 0, MIB) == target.region_read(BAR2, 0, MIB)
    saved, resumed = servers[0].status()["save"], servers[1].status()["resume"]
    assert saved["status"] == resumed["status"] == "completed"
    assert saved["digest"] == resumed["digest"]


@pytest.mark.parametrize("without", ["source", "target"])
def test_a_server_without_a_window_moves_as_before(serve: ServerFactory, without: str) -> None:
    off = ["--data-window", "off"]
    source = serve("--fill", "7", *(off if without == "source" else []))
    target = serve(*(off if without == "target" else []))
    with source.connect() as ours, target.connect() as theirs:
        lacking, having = (ours, theirs) if without == "source" else (theirs, ours)
        assert lacking.version.data_window == 0
        assert having.version.data_window == MAX_WINDOW_BYTES
        assert ask_window(lacking, 4096, sealed_memory(4096)) == errno.EINVAL
        Migrator(ours, theirs).run()
        assert lacking.migration.window is None
        assert having.migration.window is not None
        assert ours.region_read(BAR2, 0, MIB) == theirs.region_read(BAR2, 0, MIB)


def test_the_stream_is_the_same_with_and_without(server: RunningServer) -> None:
    """Byte for byte, in reads of any size; and either is taken by the other way."""
    with server.connect() as plain:
        stream = save(plain, 100_000)
    with server.connect() as device:
        assert device.migration.share(DataWindow(MIB))
        assert save(device, 70_001) == stream
        resume(device, stream, count=33_333)


@pytest.mark.parametrize("window", [True, False], ids=["window", "messages"])
def test_only_in_a_window_is_an_access_served_before_the_read_in_front_of_it(
    server: RunningServer, window: bool
) -> None:
    """Both are there at once: the reply to the write comes first, and what it wrote is in the stream.

    In messages they are served in their order, as the specification says ("Command Concurrency").
    """
    memory = DataWindow(2 * MIB)
    place = memory.place(0, MIB) if window else Place.of(memoryview(bytearray(MIB)))
    with server.connect() as device:
        migration, connection = device.migration, device.connection
        if window:
            assert migration.share(memory)
        migration.set_state(S.PRE_COPY)
        transport, held = connection._transport, list[memoryview]()
        send = transport.send

        def hold(buffers: list[memoryview], *_: object) -> bool:
            held.extend(memoryview(bytes(buffer)) for buffer in buffers)
            return True

        transport.send = hold  # type: ignore[assignment]
        read = migration.submit_read(place)
        head = messages.REGION_ACCESS.pack(999 * 8, BAR2, 8)
        write = connection.submit(
            uapi.VFIO_USER_REGION_WRITE, head, b"in front", reply_bytes=messages.REGION_ACCESS.size
        )
        transport.send = send  # type: ignore[method-assign]
        assert send(held, [], "both", lambda: True)
        connection.wait(write)
        assert read.done == (not window)
        assert migration.finish_read(read) == MIB
        assert (b"in front" in bytes(place.view)) == window


def test_several_reads_under_way_are_one_stream(server: RunningServer) -> None:
    with server.connect() as plain:
        stream = save(plain)
    with server.connect() as device:
        window, size, count = DataWindow(MIB), 8192, 100
        migration = device.migration
        assert migration.share(window)
        migration.set_state(S.STOP_COPY)
        calls = [migration.submit_read(window.place(number * size, size)) for number in range(count)]
        found = [migration.finish_read(call) for call in calls]
        assert found == [size] * count
        assert bytes(window.view[: count * size]) == stream[: count * size]


def test_bytes_outside_of_the_window_are_refused(windowed: VfioUserDevice) -> None:
    """Nothing is read and nothing lost: the stream goes on where it was."""
    migration = windowed.migration
    migration.set_state(S.STOP_COPY)
    window = migration.window
    assert window is not None
    first = migration.read(1000)
    for offset, size in [(2 * MIB, 1), (2 * MIB - 1, 2), (0, 2 * MIB + 1), ((1 << 64) - 1, 2), (1 << 63, 1)]:
        place = Place(size, window, offset)
        with pytest.raises(ClientCommandError) as caught:
            migration.finish_read(migration.submit_read(place))
        assert caught.value.errno == errno.EINVAL
    request = messages.MIG_DATA.pack(messages.MIG_DATA.size + 64, 64)
    with pytest.raises(ClientCommandError):  # as it is without a window
        windowed.connection.call(uapi.VFIO_USER_MIG_DATA_READ, request, reply_bytes=100)
    rest = read_all(windowed, MIB)
    migration.set_state(S.RUNNING)
    migration.set_state(S.STOP_COPY)
    assert first + rest == read_all(windowed, MIB)


def test_memory_that_could_go_away_is_refused(device: VfioUserDevice) -> None:
    """SIGBUS would be the end of the server, or a wait for somebody else's pages."""
    whole = sealed_memory(MIB)
    assert ask_window(device, MIB) == errno.EINVAL
    assert ask_window(device, MIB, whole, whole) == errno.EINVAL
    assert ask_window(device, 2 * MIB, whole) == errno.EINVAL
    assert ask_window(device, MIB // 2, whole) == errno.EINVAL
    assert ask_window(device, 0, whole) == errno.EINVAL
    assert ask_window(device, MIB, whole, flags=1) == errno.EINVAL
    assert ask_window(device, 100, sealed_memory(100)) == errno.EINVAL
    for seal in (0x1, 0x2, 0x4):  # each of them is needed
        assert ask_window(device, MIB, sealed_memory(MIB, SEALS & ~seal)) == errno.EINVAL
    assert ask_window(device, MIB, sealed_memory(MIB, SEALS | F_SEAL_WRITE)) == errno.EINVAL
    with open("/dev/zero", "rb") as file:
        assert ask_window(device, MIB, file.fileno()) == errno.EINVAL
    assert ask_window(device, MIB, whole) == 0
    assert ask_window(device, MIB, sealed_memory(MIB)) == errno.EEXIST
    assert device.info().resettable


def test_a_window_that_shrinks_is_none(device: VfioUserDevice) -> None:
    """An unsealed file is refused, and so nothing happens when it is cut; a sealed one cannot be."""
    fd = sealed_memory(MIB, 0)
    assert ask_window(device, MIB, fd) == errno.EINVAL
    os.ftruncate(fd, 0)
    sealed = sealed_memory(MIB)
    assert ask_window(device, MIB, sealed) == 0
    with pytest.raises(PermissionError):
        os.ftruncate(sealed, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE)


def test_a_window_is_limited(server: RunningServer) -> None:
    """To what the server says, which is memory that a client can have it map."""
    for size, expected in [(MAX_WINDOW_BYTES + mmap.PAGESIZE, errno.EINVAL), (MAX_WINDOW_BYTES, 0)]:
        with server.connect() as device:
            fd = sealed_memory(size)
            assert ask_window(device, size, fd) == expected
            os.close(fd)


def test_a_window_ends_with_its_connection(server: RunningServer) -> None:
    """The next client has none, though the state of the server is otherwise the same; and may make one."""
    for _ in range(3):
        with server.connect() as device:
            assert device.migration.window is None
            stream = save(device)
            assert device.migration.share(DataWindow(MIB))
            assert save(device) == stream
    wait_until(lambda: not server.status()["connected"], "the server drops its last client")
    assert "vfu-dev-window" not in Path(f"/proc/{server.process.pid}/maps").read_text()
