"""The replay of a profile: sizes to the byte, made-up content that is checked, the device's state in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfu_dev.device import Device
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.errors import ConfigError, StreamError
from vfu_dev.libvfio_user import DeviceCallbacks
from vfu_dev.memory.kernels import join_vectors
from vfu_dev.profile import Distribution, Profile, Value
from vfu_dev.profile.model import Calls, Dirty, Initial, Phases, Reads, Reinit, StopCopy
from vfu_dev.replay.draw import Draw
from vfu_dev.replay.frames import HEADER, Content
from vfu_dev.replay.laws import DirtyLaw, stop_copy_length
from vfu_dev.replay.pace import PacedCallbacks
from vfu_dev.replay.scale import scaled
from vfu_dev.replay.session import ReplaySave, ReplaySessions
from vfu_dev.uapi import DeviceState

MIB = 1 << 20


def given_of(value: float) -> Value[float]:
    return Value.assumed(value)


def size(value: int) -> Value[int]:
    return Value.assumed(value)


def sizes(*points: tuple[int, int]) -> Value[Distribution]:
    return Value.assumed(Distribution(tuple((float(value), count) for value, count in points)))


class Clock:
    """A clock that stands still until `advance` moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Pair:
    """A source and a destination that replay a profile; no server, no wire, no waiting."""

    def __init__(self, profile: Profile, memory_bytes: int = 64 << 10) -> None:
        self.source = ReferenceDevice("source", memory_bytes=memory_bytes, fill_seed=7)
        self.destination = ReferenceDevice("destination", memory_bytes=memory_bytes)
        self.sessions = [ReplaySessions(profile, one.migration) for one in (self.source, self.destination)]
        self.clock = Clock()
        self.read: list[int] = []

    def enter(self, device: Device, state: DeviceState) -> None:
        """Have a device change its state; a session's time is this pair's."""
        device.migration.set_state(state)
        saving = self.sessions[0].saving
        if saving is not None and saving._clock is not self.clock:
            saving._clock, saving.began = self.clock, self.clock.now

    def move(self, count: int = MIB) -> bytes:
        """Read once at the source; return what came."""
        vectors = self.source.migration.read(count)
        data = bytearray(int(vectors[:, 1].sum()))
        join_vectors(vectors, memoryview(data))
        self.read.append(len(data))
        return bytes(data)

    def all(self, count: int = MIB) -> bytes:
        """Read until there is no more."""
        return b"".join(iter(lambda: self.move(count), b""))

    def close(self) -> None:
        """Close both devices."""
        self.source.close()
        self.destination.close()


def migrate(pair: Pair, profile: Profile, slices: int = MIB) -> tuple[int, int]:
    """Move; return the bytes of PRE_COPY and of STOP_COPY."""
    pair.enter(pair.source, DeviceState.PRE_COPY)
    pair.enter(pair.destination, DeviceState.RESUMING)
    before = pair.all()
    pair.enter(pair.source, DeviceState.STOP_COPY)
    after = pair.all()
    stream = memoryview(before + after)
    for begin in range(0, len(stream), slices):
        pair.destination.migration.write(stream[begin : begin + slices])
    pair.enter(pair.destination, DeviceState.RUNNING)
    return len(before), len(after)


NIC = Profile(
    name="nic",
    initial=Initial(bytes=size(3 * MIB + 5)),
    dirty=Dirty(kind="curve", curve=Value.assumed(((0.0, 100_000.0),)), after=Value.assumed("stop")),
    stop_copy=StopCopy(kind="following", extra_bytes=size(MIB)),
    reads=Reads(initial=Calls(bytes=sizes((1000, 3), (MIB, 3)))),
)


@pytest.mark.parametrize("slices", [1, 4097, MIB])
def test_a_move_has_the_profiles_sizes_and_the_devices_state(slices: int) -> None:
    if slices == 1:
        profile = replace(
            NIC, initial=Initial(bytes=size(5000)), stop_copy=StopCopy(kind="constant", bytes=size(90_000))
        )
    else:
        profile = NIC
    pair = Pair(profile)
    before, after = migrate(pair, profile, slices)
    assert profile.initial.bytes is not None
    assert before == profile.initial.bytes.value + 100_000
    assert after == (90_000 if slices == 1 else MIB)
    source, destination = pair.source.memories[0], pair.destination.memories[0]
    assert np.array_equal(source.rows, destination.rows)
    assert source.rows.any()
    record = pair.source.migration.save_status()
    assert record is not None
    assert record["digest"] == pair.destination.migration.resume_status()["digest"]  # type: ignore[index]
    assert not pair.sessions[0].overshoot_bytes
    pair.close()


def test_reads_have_the_sizes_that_were_drawn() -> None:
    profile = replace(NIC, initial=Initial(bytes=size(3000 + 3 * MIB)))
    pair = Pair(profile)
    pair.enter(pair.source, DeviceState.PRE_COPY)
    for _ in range(6):
        pair.move()
    assert sorted(pair.read) == [1000] * 3 + [MIB] * 3
    assert pair.source.migration.precopy_info().initial_bytes == 0
    pair.close()


@settings(max_examples=60, deadline=None)
@given(
    initial=st.integers(0, 200_000),
    dirty=st.integers(0, 100_000),
    extra=st.integers(0, 200_000),
    each=st.integers(1, 50_000),
    count=st.integers(17, 70_000),
)
def test_any_sizes_arrive(initial: int, dirty: int, extra: int, each: int, count: int) -> None:
    """To the byte, unless the device's own state needs more than STOP_COPY has: then that is counted."""
    profile = Profile(
        initial=Initial(bytes=size(initial)),
        dirty=Dirty(kind="curve", curve=Value.assumed(((0.0, float(dirty)),)), after=Value.assumed("stop")),
        stop_copy=StopCopy(kind="following", extra_bytes=size(extra)),
        reads=Reads(stop_copy=Calls(bytes=sizes((max(each, 100), 1)))),
    )
    pair = Pair(profile, 4096)
    pair.enter(pair.source, DeviceState.PRE_COPY)
    pair.enter(pair.destination, DeviceState.RESUMING)
    before = pair.all(count)
    pair.enter(pair.source, DeviceState.STOP_COPY)
    after = pair.all(count)
    assert len(before) == initial + dirty
    assert len(after) == extra + pair.sessions[0].overshoot_bytes
    pair.destination.migration.write(memoryview(before + after))
    pair.enter(pair.destination, DeviceState.RUNNING)
    assert np.array_equal(pair.source.memories[0].rows, pair.destination.memories[0].rows)
    pair.close()


def stream_of(profile: Profile) -> bytes:
    pair = Pair(profile, 4096)
    pair.enter(pair.source, DeviceState.PRE_COPY)
    stream = pair.all()
    pair.enter(pair.source, DeviceState.STOP_COPY)
    stream += pair.all()
    pair.close()
    return stream


SMALL = Profile(initial=Initial(bytes=size(300)), stop_copy=StopCopy(kind="constant", bytes=size(6000)))


def resumed(data: bytes) -> None:
    """Take a stream and go to RUNNING. Raises: StreamError."""
    pair = Pair(SMALL, 4096)
    try:
        pair.enter(pair.destination, DeviceState.RESUMING)
        pair.destination.migration.write(memoryview(data))
        pair.enter(pair.destination, DeviceState.RUNNING)
    finally:
        pair.close()


def test_a_whole_stream_is_taken() -> None:
    resumed(stream_of(SMALL))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_is_taken(data: st.DataObject) -> None:
    stream = bytearray(stream_of(SMALL))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StreamError):
        resumed(bytes(stream))


@pytest.mark.parametrize("left", [0, 1, HEADER.size, 300, -1])
def test_no_part_is_taken(left: int) -> None:
    stream = stream_of(SMALL)
    with pytest.raises(StreamError):
        resumed(stream[:left])


@pytest.mark.parametrize("count", [1, HEADER.size, HEADER.size + 1])
def test_a_read_never_has_more_than_the_client_asked_for(count: int) -> None:
    """Reads that are too small for a frame's header carry the stream, too."""
    pair = Pair(SMALL, 4096)
    pair.enter(pair.source, DeviceState.PRE_COPY)
    stream = pair.all(count)
    pair.enter(pair.source, DeviceState.STOP_COPY)
    stream += pair.all(count)
    assert max(pair.read) <= count
    assert pair.source.migration.stop_copy_length() == 0
    pair.close()
    resumed(stream)


def test_nothing_is_taken_behind_the_end() -> None:
    with pytest.raises(StreamError, match="goes on"):
        resumed(stream_of(SMALL) + b"P")


def test_a_destination_without_the_profile_refuses() -> None:
    device = ReferenceDevice("plain", memory_bytes=4096)
    device.migration.set_state(DeviceState.RESUMING)
    with pytest.raises(StreamError):
        device.migration.write(memoryview(stream_of(SMALL)))
    device.close()


def test_a_plain_source_is_refused() -> None:
    device = ReferenceDevice("plain", memory_bytes=4096)
    device.migration.set_state(DeviceState.STOP_COPY)
    buffer = bytearray(MIB)
    count = device.migration.read_into(memoryview(buffer))
    device.close()
    with pytest.raises(StreamError, match="--profile"):
        resumed(bytes(buffer[:count]))


# --- laws ---------------------------------------------------------------------------------------------------


def law(**keys: object) -> DirtyLaw:
    return DirtyLaw(Profile(dirty=Dirty(**keys)))  # type: ignore[arg-type]


def test_a_rate_grows_until_its_limit() -> None:
    one = law(kind="rate", bytes_per_second=given_of(1000.0), limit_bytes=size(2500))
    assert [one.pending(at, all_read=True) for at in (0.0, 1.0, 2.0, 9.0)] == [0, 1000, 2000, 2500]
    one.took(2000)
    assert [one.pending(at, all_read=True) for at in (9.0, 10.0)] == [500, 1500]


def test_steps_change_the_rate() -> None:
    steps = Value.assumed(((1.0, 100.0), (2.0, 0.0), (3.0, 10.0)))
    asked = (0.5, 1.5, 2.5, 3.0, 4.0)
    one = law(kind="steps", steps=steps, after=Value.assumed("stop"))
    assert [one.pending(at, all_read=True) for at in asked] == [0, 50, 100, 100, 100]
    # The mean rate until the last point.
    assert law(kind="steps", steps=steps).pending(6.0, all_read=True) == 200


def test_a_curve_is_repeated() -> None:
    curve = Value.assumed(((1.0, 10.0), (1.0, 30.0), (2.0, 40.0)))
    one = law(kind="curve", curve=curve, after=Value.assumed("repeat"))
    assert [one.pending(at, all_read=True) for at in (0.5, 1.0, 1.5, 2.0, 2.5)] == [5, 30, 35, 40, 45]


def test_a_refill_waits_until_all_is_read() -> None:
    one = law(kind="refill", refill_bytes=size(100), refill_seconds=given_of(1.0))
    assert one.pending(2.0, all_read=False) == 0
    assert one.pending(2.0, all_read=True) == 100
    one.took(60)
    assert one.pending(9.0, all_read=True) == 40
    one.took(40)
    assert one.pending(9.0, all_read=True) == 100
    one.took(100)
    assert [one.pending(at, all_read=True) for at in (9.5, 10.0)] == [0, 100]


@pytest.mark.parametrize(
    ("keys", "lengths"),
    [
        ({"kind": "constant", "bytes": size(21_038_628_864)}, [21_038_628_864] * 3),
        ({"kind": "following", "extra_bytes": size(7)}, [57, 57, 57]),
        ({}, [50, 50, 50]),
        ({"kind": "growing", "bytes": size(10), "bytes_per_second": given_of(5.0)}, [10, 15, 20]),
        ({"kind": "steps", "steps": Value.assumed(((0.5, 3.0), (1.5, 9.0)))}, [3, 3, 9]),
        ({"kind": "constant", "bytes": size(10), "limit_bytes": size(4)}, [4, 4, 4]),
    ],
)
def test_stop_copy_length(keys: dict[str, object], lengths: list[int]) -> None:
    profile = Profile(stop_copy=StopCopy(**keys))  # type: ignore[arg-type]
    assert [stop_copy_length(profile, at, 50) for at in (0.0, 1.0, 2.0)] == lengths


def test_an_estimate_of_nothing_beside_an_exact_size() -> None:
    """initial_bytes and dirty_bytes are 0, MIG_DATA_SIZE is not: what virtio's drivers were seen to say."""
    pair = Pair(Profile(stop_copy=StopCopy(kind="constant", bytes=size(21_038_628_864))))
    pair.enter(pair.source, DeviceState.PRE_COPY)
    info = pair.source.migration.precopy_info()
    assert (info.initial_bytes, info.dirty_bytes) == (0, 0)
    assert pair.source.migration.stop_copy_length() == 21_038_628_864
    pair.close()


@pytest.mark.parametrize("knows", [True, False])
def test_a_reinit_raises_initial_bytes_for_a_client_that_knows(knows: bool) -> None:
    profile = replace(NIC, reinits=(Reinit(seconds=given_of(2.0), bytes=size(4096)),))
    pair = Pair(profile)
    pair.source.migration.client_knows_reinit = knows
    pair.enter(pair.source, DeviceState.PRE_COPY)
    pair.all()
    assert pair.source.migration.precopy_info().initial_bytes == 0
    pair.clock.now = 2.0
    info = pair.source.migration.precopy_info()
    assert (info.initial_bytes, info.dirty_bytes) == ((4096, 0) if knows else (0, 4096))
    assert pair.source.migration.take_reinit() is knows
    assert len(pair.all()) == 4096
    pair.close()


# --- draws and scale ----------------------------------------------------------------------------------------


@given(points=st.dictionaries(st.integers(0, 1000), st.integers(1, 20), min_size=1, max_size=5))
def test_a_round_of_draws_is_the_distribution(points: dict[int, int]) -> None:
    distribution = Distribution(tuple(sorted((float(value), count) for value, count in points.items())))
    draw = Draw(distribution)
    for _ in range(2):
        assert Distribution.of(draw() for _ in range(distribution.count)) == distribution


def test_a_scale_divides_sizes_and_rates_and_no_times() -> None:
    profile = replace(
        NIC,
        dirty=Dirty(
            kind="rate",
            bytes_per_second=given_of(1000.0),
            refill_seconds=given_of(3.0),
            limit_bytes=size(1001),
        ),
        reinits=(Reinit(seconds=given_of(2.0), bytes=size(4096)),),
    )
    small = scaled(profile, 10)
    assert small.initial.bytes == size(-(-(3 * MIB + 5) // 10))
    assert small.dirty == Dirty(
        kind="rate", bytes_per_second=given_of(100.0), refill_seconds=given_of(3.0), limit_bytes=size(101)
    )
    assert small.reads.initial.bytes == sizes((100, 3), (-(-MIB // 10), 3))
    assert small.reinits == (Reinit(seconds=given_of(2.0), bytes=size(410)),)
    assert scaled(profile, 1) is profile
    for impossible in (0, -1, 10**5000):
        with pytest.raises(ConfigError, match="expected 1 to"):
            scaled(profile, impossible)


def test_content_is_as_compressible_as_the_profile_says() -> None:
    for part in (0.0, 0.75, 1.0):
        profile = replace(NIC, content=replace(NIC.content, compressibility=given_of(part)))
        pair = Pair(profile)
        pair.enter(pair.source, DeviceState.PRE_COPY)
        data = b"".join(itertools.islice(iter(pair.move, b""), 3))
        assert data.count(0) / len(data) == pytest.approx(part, abs=0.02)
        pair.close()


def test_what_is_made_up_is_there_once() -> None:
    """Closed devices wait for the garbage collector; hundreds of them, with a pool each, were 3 GB."""
    contents = [Content(0.5) for _ in range(3)]
    assert len({id(one.pieces(4096)[0].obj) for one in contents}) == 1
    assert Content(0.5).pieces(4096) != Content(0.25).pieces(4096)


def test_reads_wait_for_initial_data_that_is_not_ready() -> None:
    profile = replace(NIC, initial=Initial(bytes=size(100), ready_seconds=given_of(1.0)))
    pair = Pair(profile)
    pair.enter(pair.source, DeviceState.PRE_COPY)
    saving = pair.sessions[0].saving
    assert isinstance(saving, ReplaySave)
    assert not saving.ready
    pair.clock.now = 1.0
    assert saving.ready
    pair.close()


def straight(device: Device) -> DeviceCallbacks:
    """The two callbacks of data, as a server has them."""
    return cast(DeviceCallbacks, SimpleNamespace(gather=device.migration.read, write=device.migration.write))


@pytest.mark.parametrize("buffer", [None, size(100)], ids=["reads of 100 bytes", "reads fill a buffer"])
def test_bytes_that_the_profile_does_not_have_take_no_time(buffer: Value[int] | None) -> None:
    """The device's own state has no room in 100 bytes. One read takes 1000 s, those of the rest nothing."""
    calls = Calls(bytes=sizes((100, 1)), seconds=Value.assumed(Distribution.always(1000.0)))
    profile = Profile(
        name="small",
        stop_copy=StopCopy(kind="constant", bytes=size(100)),
        reads=Reads(buffer_bytes=buffer, stop_copy=calls),
        writes=Phases(stop_copy=calls),
    )
    pair, held = Pair(profile), list[float]()

    def hold(seconds: float | None, over: Callable[[], bool]) -> None:
        assert seconds is not None
        held.append(seconds)

    source, destination = (
        PacedCallbacks(profile, sessions, device.migration, hold, straight(device))
        for sessions, device in zip(pair.sessions, (pair.source, pair.destination), strict=True)
    )
    pair.enter(pair.source, DeviceState.STOP_COPY)
    pair.enter(pair.destination, DeviceState.RESUMING)
    stream = []
    while (vectors := source.gather(MIB)) is not None and len(vectors):
        stream.append(bytearray(int(vectors[:, 1].sum())))
        join_vectors(vectors, memoryview(stream[-1]))
    assert pair.sessions[0].overshoot_bytes > 1000
    assert len(stream) == 1 if buffer else len(stream) > 10
    (read,) = held
    assert 500 < read <= 1000
    for data in stream:
        destination.write(memoryview(data))
    assert all(500 < seconds <= 1000 for seconds in held)
    assert len(held) == 1 + len(stream)
    pair.enter(pair.destination, DeviceState.RUNNING)
    pair.close()
