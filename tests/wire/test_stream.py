"""The migration stream over the wire: sizes promised and kept, slices of any size, damage refused."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest
from serverkit import RunningServer, ServerFactory
from streamkit import abandon_resume, read_all, resume, save

from vfu_dev.client import ClientCommandError, ClientOptions, Migrator, VfioUserDevice
from vfu_dev.uapi import DeviceState

S = DeviceState
BAR2 = 2
MIB = 1 << 20


def same_memory(one: VfioUserDevice, other: VfioUserDevice, size: int = MIB) -> bool:
    return one.region_read(BAR2, 0, size) == other.region_read(BAR2, 0, size)


def test_pre_copy_reads_what_was_promised(server: RunningServer, device: VfioUserDevice) -> None:
    """initial_bytes falls to zero by what is read; what dirty_bytes and stop_copy_length say is read.

    Authority: struct vfio_precopy_info in <linux/vfio.h>; byte counts are stream bytes, framing included.
    """
    migration = device.migration
    migration.set_state(S.PRE_COPY)
    first = migration.precopy_info()
    assert first.initial_bytes > MIB
    assert first.dirty_bytes == 0
    read = 0
    while (left := migration.precopy_info().initial_bytes) > 0:
        assert left == first.initial_bytes - read
        data = migration.read(min(100_000, left))
        assert len(data) == min(100_000, left)
        read += len(data)
    assert read == first.initial_bytes
    assert migration.read(4096) == b""

    for page in (3, 77, 78, 200):
        device.region_write(BAR2, page * 4096 + 5, b"dirty")
    info = migration.precopy_info()
    assert (info.initial_bytes, info.dirty_bytes) != (0, 0)
    assert info.initial_bytes == 0
    assert 4 * 4096 <= info.dirty_bytes < 6 * 4096
    size_before = migration.data_size()
    assert len(read_all(device, MIB)) == info.dirty_bytes
    assert migration.precopy_info().dirty_bytes == 0
    assert migration.data_size() == size_before - info.dirty_bytes

    device.region_write(BAR2, 9 * 4096, b"last")
    promised = migration.data_size()
    migration.set_state(S.STOP_COPY)
    assert migration.data_size() == promised
    assert len(read_all(device, 10_000)) == promised
    assert migration.data_size() == 0
    migration.set_state(S.STOP)
    saved = server.status()["save"]
    assert saved["status"] == "completed"
    assert saved["initial_bytes"] == first.initial_bytes
    assert saved["precopy_bytes"] == first.initial_bytes + info.dirty_bytes
    assert saved["stop_copy_bytes"] == promised


def test_estimate_and_exact_size_agree(device: VfioUserDevice) -> None:
    """QEMU spins if they do not: stop_copy_length is initial + dirty + the same small rest at every step."""
    migration = device.migration
    migration.set_state(S.PRE_COPY)
    rests = set()
    chance = random.Random(1)
    for _ in range(40):
        info = migration.precopy_info()
        rests.add(migration.data_size() - info.initial_bytes - info.dirty_bytes)
        migration.read(chance.randrange(1, 150_000))
        device.region_write(BAR2, chance.randrange(MIB - 8), b"!" * 8)
    assert len(rests) == 1, rests
    assert 0 < rests.pop() < 65536
    migration.set_state(S.RUNNING)


@pytest.mark.parametrize("count", [1, 7, 4095, 4096, 65537, MIB])
def test_slices_of_any_size_make_the_same_device(serve: ServerFactory, count: int) -> None:
    """A record need not end with a message, and a short read means the end: all others are filled."""
    size = {1: 4096, 7: 16384}.get(count, MIB)
    memory = str(size)
    source, destination = serve("--fill", "11", memory=memory), serve(memory=memory)
    with source.connect() as device, destination.connect() as other:
        migration = device.migration
        migration.set_state(S.PRE_COPY)
        parts = []
        while data := migration.read(count):
            parts.append(data)
        assert all(len(part) == count for part in parts[:-1])
        device.region_write(BAR2, size // 2, b"late change")
        migration.set_state(S.STOP_COPY)
        parts += iter(lambda: migration.read(count), b"")
        migration.set_state(S.STOP)
        resume(other, b"".join(parts), count=max(1, count // 3))
        assert same_memory(device, other, size)
        saved, resumed = source.status()["save"], destination.status()["resume"]
        assert saved["digest"] == resumed["digest"]
        assert (
            resumed["received_bytes"]
            == sum(map(len, parts))
            == saved["precopy_bytes"] + saved["stop_copy_bytes"]
        )


def test_data_commands_outside_of_their_states_are_refused(device: VfioUserDevice) -> None:
    migration = device.migration
    for state in (S.RUNNING, S.STOP, S.STOP_COPY, S.RESUMING, S.PRE_COPY):
        if state is not S.RUNNING:
            migration.set_state(state)
        if state not in (S.PRE_COPY, S.STOP_COPY):
            with pytest.raises(ClientCommandError) as caught:
                migration.read(16)
            assert caught.value.errno == errno.EINVAL
        if state is not S.PRE_COPY:
            with pytest.raises(ClientCommandError) as caught:
                migration.precopy_info()
            assert caught.value.errno == errno.EINVAL
        if state is not S.RESUMING:
            with pytest.raises(ClientCommandError) as caught:
                migration.write(b"data")
            assert caught.value.errno == errno.EINVAL
        assert migration.get_state() is state
        if state is S.RESUMING:
            with pytest.raises(ClientCommandError):
                migration.set_state(S.RUNNING)
            device.reset()
        elif state is not S.RUNNING:
            migration.set_state(S.RUNNING)


def damage_flip(stream: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(stream))
    return stream[:place] + bytes([stream[place] ^ (1 << chance.randrange(8))]) + stream[place + 1 :]


def damage_cut(stream: bytes, chance: random.Random) -> bytes:
    return stream[: chance.randrange(len(stream))]


def damage_drop(stream: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(stream) - 1)
    return stream[:place] + stream[place + chance.randrange(1, min(5000, len(stream) - place)) :]


def damage_repeat(stream: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(stream) - 1)
    return stream[:place] + stream[max(0, place - chance.randrange(1, 5000)) : place] + stream[place:]


def damage_swap(stream: bytes, chance: random.Random) -> bytes:
    middle = chance.randrange(len(stream) // 4, len(stream) // 2)
    return stream[:1000] + stream[middle:] + stream[1000:middle]


def damage_extend(stream: bytes, chance: random.Random) -> bytes:
    return stream + chance.randbytes(chance.randrange(1, 100))


def damage_noise(stream: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(len(stream))


DAMAGES = [damage_flip, damage_cut, damage_drop, damage_repeat, damage_swap, damage_extend, damage_noise]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stream_never_runs(
    server: RunningServer, device: VfioUserDevice, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    """Refused when written or at RESUMING -> STOP, with a reason; a good stream is taken afterwards."""
    good = save(device)
    chance = random.Random(20)
    for _ in range(15):
        bad = damage(good, chance)
        if bad == good:
            continue
        with pytest.raises(ClientCommandError) as caught:
            resume(device, bad, count=chance.choice([1000, 65536, MIB]))
        assert caught.value.errno == errno.EINVAL
        resumed = server.status()["resume"]
        assert resumed["status"] == "failed"
        assert resumed["error"]
        abandon_resume(device)
        assert device.migration.get_state() is S.RUNNING
    assert resumed["error"] in server.log()
    resume(device, good)
    assert server.status()["resume"]["status"] == "completed"


def test_a_failed_stream_stays_failed(device: VfioUserDevice) -> None:
    """Going on after an error, even with a good stream from its start, leads nowhere."""
    good = save(device)
    device.migration.set_state(S.RESUMING)
    with pytest.raises(ClientCommandError):
        device.migration.write(b"\0" * len(good))
    with pytest.raises(ClientCommandError):
        device.migration.write(good)
    with pytest.raises(ClientCommandError):
        device.migration.set_state(S.STOP)


def test_another_shape_is_refused_in_the_first_message(serve: ServerFactory) -> None:
    """A destination of another size refuses while the source still runs, and says both sizes."""
    source, destination = serve("--fill", "1"), serve(memory="2M")
    with source.connect() as device, destination.connect() as other:
        device.migration.set_state(S.PRE_COPY)
        other.migration.set_state(S.RESUMING)
        first = device.migration.read(4096)
        with pytest.raises(ClientCommandError) as caught:
            other.migration.write(first)
        assert caught.value.errno == errno.EINVAL
        device.region_write(BAR2, 0, b"the source still runs")
        error = destination.status()["resume"]["error"]
        assert str(MIB) in error
        assert str(2 * MIB) in error
        device.migration.set_state(S.RUNNING)


def test_the_migrator_moves_a_device_that_is_written_to(serve: ServerFactory) -> None:
    """Writes during PRE_COPY arrive; what was read in each phase is what the source's server says it sent."""
    source, destination = serve("--fill", "9", memory="8M"), serve(memory="8M")
    with source.connect() as device, destination.connect() as other:
        writes = 0

        def dirty(_: object) -> None:
            nonlocal writes
            if device.migration.get_state() is S.PRE_COPY:
                device.region_write(BAR2, (writes * 13 % 2048) * 4096, writes.to_bytes(8, "little"))
                writes += 1

        state = Migrator(device, other, ClientOptions(max_bandwidth=64 * MIB), reporter=dirty).run()
        assert writes > 0
        assert state.passes >= 1
        assert other.migration.get_state() is S.RUNNING
        assert device.migration.get_state() is S.STOP
        assert same_memory(device, other, 8 * MIB)
        saved, resumed = source.status()["save"], destination.status()["resume"]
        assert saved["digest"] == resumed["digest"]
        assert (saved["precopy_bytes"], saved["stop_copy_bytes"]) == (
            state.precopy_bytes,
            state.stop_copy_bytes,
        )
        assert saved["initial_bytes"] == state.initial_bytes


def test_a_cancelled_migration_can_be_done_again(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "9"), serve()
    with source.connect() as device:
        device.migration.set_state(S.PRE_COPY)
        device.migration.read(100_000)
        device.migration.set_state(S.RUNNING)
        assert source.status()["save"]["status"] == "aborted"
        device.region_write(BAR2, 0, b"between")
        with destination.connect() as other:
            Migrator(device, other).run()
            assert same_memory(device, other)
