"""The closed loop: what is imported from the replay of a profile is that profile."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from loopkit import compare
from serverkit import ServerFactory

from vfu_dev.client import VfioUserDevice
from vfu_dev.client.messages import ClientPrecopyInfo
from vfu_dev.profile import Distribution, Profile, Value, profile_text
from vfu_dev.profile.compare import Tolerance, differences
from vfu_dev.profile.importing import Wanted, import_profile
from vfu_dev.profile.keys import entries
from vfu_dev.profile.kinds import SECONDS, SECONDS_SPREAD
from vfu_dev.profile.model import (
    Calls,
    Dirty,
    Features,
    Initial,
    Loading,
    MigrationSettings,
    Phases,
    Reads,
    Reinit,
    StopCopy,
)
from vfu_dev.replay.laws import known
from vfu_dev.uapi import VFIO_PRECOPY_INFO_REINIT, DeviceState

BUFFER = 64 << 10
# A replay's own state is in STOP_COPY, which needs room for it.
LEAST_STOP_COPY = 128 << 10


class Recorder:
    """Calls a device and writes each call as `vfu-dev profile record` does."""

    def __init__(self, device: VfioUserDevice, path: Path) -> None:
        self._calls = device.migration
        self._path = path
        self._lines = ["vfu-dev calls 1"]

    def _call(self, name: str, function: Callable[[], object], answer: Callable[[object], str]) -> object:
        began = time.monotonic_ns()
        result = function()
        self._lines.append(f"{began} {time.monotonic_ns()} {os.getpid()} 0 {name} = {answer(result)}")
        return result

    def flags(self) -> None:
        """Ask what the device announces, and opt in to REINIT."""
        self._call("flags", self._calls.flags, lambda flags: f"0 {int(flags)}")
        self._call("precopy-info-v2", self._calls.enable_precopy_info_v2, lambda _: "0")

    def set_state(self, state: DeviceState) -> None:
        """Ask for a state."""
        self._call(f"set-state {int(state)}", lambda: self._calls.set_state(state), lambda _: "0")

    def sizes(self) -> ClientPrecopyInfo:
        """Ask for both sizes, as QEMU does when it decides."""
        self._call("data-size", self._calls.data_size, lambda length: f"0 {length}")
        info = self._call(
            "precopy-info",
            self._calls.precopy_info,
            lambda info: f"0 {info.initial_bytes} {info.dirty_bytes} {int(info.flags)}",
        )
        assert isinstance(info, ClientPrecopyInfo)
        return info

    def read(self) -> bytes:
        """Read once."""
        data = self._call(
            f"read {BUFFER}",
            lambda: self._calls.read(BUFFER),
            lambda data: str(len(data)),
        )
        assert isinstance(data, bytes)
        return data

    def write(self, data: bytes) -> None:
        """Write once."""
        self._call(f"write {len(data)}", lambda: self._calls.write(data), lambda _: str(len(data)))

    def save(self) -> Path:
        """Write the file."""
        self._path.write_text("\n".join(self._lines) + "\n")
        return self._path


class TooEarlyError(Exception):
    """A REINIT came before the initial data was read, which it then replaces: the machine is too slow."""


def loop(serve: ServerFactory, folder: Path, profile: Profile, seconds: float = 0.0) -> Profile:
    """Serve `profile` twice, migrate from one to the other, and import what was recorded.

    Args: seconds: how long PRE_COPY is at least.
    """
    file = folder / "profile.toml"
    file.write_text(profile_text(profile))
    servers = [serve("--profile", str(file), memory="4K") for _ in range(2)]
    with servers[0].connect() as one, servers[1].connect() as other:
        source, destination = (
            Recorder(device, folder / f"{name}.calls")
            for device, name in ((one, "source"), (other, "destination"))
        )
        source.flags()
        destination.flags()
        began = time.monotonic()
        source.set_state(DeviceState.PRE_COPY)
        destination.set_state(DeviceState.RESUMING)
        source.sizes()
        until = time.monotonic() + seconds
        # Dirty data is not read until the REINIT was told: such a read might have its initial data instead.
        told, waiting, read_at = 0, len(profile.reinits), None
        while (info := source.sizes()).initial_bytes or time.monotonic() < until or told < waiting:
            told += bool(info.flags & VFIO_PRECOPY_INFO_REINIT)
            if not info.initial_bytes and read_at is None:
                read_at = time.monotonic() - began
            if info.initial_bytes or (info.dirty_bytes and told == waiting):
                destination.write(source.read())
            else:
                time.sleep(0.01)
        # `began` is before the server's own, so this errs on the safe side.
        too_early = any(read_at is None or known(one.seconds) <= read_at for one in profile.reinits)
        source.set_state(DeviceState.STOP_COPY)
        while data := source.read():
            destination.write(data)
        source.set_state(DeviceState.STOP)
        destination.set_state(DeviceState.RUNNING)
        assert [server.status()["replay"]["overshoot_bytes"] for server in servers] == [0, 0]
        paths = [source.save(), destination.save()]
    for server in servers:
        server.stop()
    if too_early:
        raise TooEarlyError
    return import_profile(paths, "again", Wanted(), MigrationSettings())[0]


def spread(*points: tuple[float, int]) -> Value[Distribution]:
    return Value.measured(Distribution(tuple(sorted(points))))


TIMES = st.integers(0, 20).map(lambda ms: ms / 1000)


# Long enough for all that the laws below do.
LAW_SECONDS = 0.15
# After the reads of the initial data, 0.14 s at most where the machine is not too slow.
REINIT_SECONDS = 0.3
# Bytes a second: a jump of stop_copy_length is more than what becomes dirty in seconds.
RATES = st.integers(10_000, 200_000).map(float)
JUMPS = st.integers(1_000_000, 2_000_000)


def measured_dirty(**keys: Any) -> Dirty:
    return Dirty(**{key: value if key == "kind" else Value.measured(value) for key, value in keys.items()})


DIRTY = st.one_of(
    st.just(Dirty(kind="none")),
    RATES.map(lambda rate: measured_dirty(kind="rate", bytes_per_second=rate)),
    st.tuples(RATES, RATES).map(
        lambda rates: measured_dirty(kind="steps", steps=((0.02, rates[0]), (0.08, rates[1])))
    ),
    st.tuples(st.integers(1, 20_000), st.integers(0, 20_000)).map(
        lambda more: measured_dirty(
            kind="curve",
            curve=((0.0, 0.0), (0.04, float(more[0])), (0.04, more[0] + 5000.0), (0.1, sum(more) + 5000.0)),
            after="stop",
        )
    ),
)
# None: following.
LENGTHS = st.one_of(
    st.none(),
    JUMPS.map(lambda size: StopCopy(kind="constant", bytes=Value.measured(size))),
    st.integers(4_000_000, 8_000_000).map(float).map(
        lambda rate: StopCopy(
            kind="growing", bytes=Value.measured(LEAST_STOP_COPY), bytes_per_second=Value.measured(rate)
        )
    ),
    st.tuples(JUMPS, JUMPS).map(
        lambda more: StopCopy(
            kind="steps",
            steps=Value.measured(
                ((0.0, float(LEAST_STOP_COPY)), (0.05, LEAST_STOP_COPY + float(more[0])),
                 (0.1, LEAST_STOP_COPY + float(sum(more))))
            ),
        )
    ),
)  # fmt: skip


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Return a profile all of whose values a record of one migration can show.

    Where something happens in time, how many reads there are depends on the machine: they have no times then.
    """

    def calls(size: int, count: int) -> Calls:
        """Reads or writes of one size, `count` of them."""
        seconds = spread((draw(TIMES), count - 1)) if count > 1 else None
        return Calls(spread((float(size), count)), seconds, Value.measured(draw(TIMES)))

    dirty, stop_copy = draw(DIRTY), draw(LENGTHS)
    read, initial_reads = draw(st.integers(100, 20_000)), draw(st.integers(1, 6))
    stop_read = draw(st.integers(40_000, BUFFER))
    stop_reads = -(-LEAST_STOP_COPY // stop_read) + draw(st.integers(0, 3))
    # What appears in a REINIT is read like the initial data before it.
    again_reads = draw(st.integers(0, 3))
    initial, tail = read * initial_reads, stop_read * stop_reads
    initial_calls, stop_calls = calls(read, initial_reads + again_reads), calls(stop_read, stop_reads)
    if dirty.kind != "none" or stop_copy is not None:
        stop_calls = Calls()
    # The write with the last byte of initial data takes the loading's time besides its own.
    return Profile(
        name="drawn",
        origin="made-up",
        features=Features(
            Value.measured(True), Value.measured(draw(st.booleans())), precopy_info_v2=Value.measured(True)
        ),
        initial=Initial(Value.measured(initial)),
        dirty=dirty,
        stop_copy=stop_copy or StopCopy(kind="following", extra_bytes=Value.measured(tail)),
        reads=Reads(initial_calls, Calls(), stop_calls, Value.measured(BUFFER)),
        source_arcs={
            "RUNNING->PRE_COPY": spread((draw(TIMES), 1)),
            "PRE_COPY->STOP_COPY": spread((draw(TIMES), 1)),
        },
        destination_arcs={
            "RUNNING->RESUMING": spread((draw(TIMES), 1)),
            "RESUMING->RUNNING": spread((draw(TIMES), 1)),
        },
        writes=Phases(stop_copy=stop_calls),
        loading=Loading(Value.measured(draw(TIMES))),
        reinits=(Reinit(Value.measured(REINIT_SECONDS), Value.measured(read * again_reads)),)
        if again_reads
        else (),
    )


# What `compare` judges by what the profile's law allows.
LAWS = ("dirty.", "stop_copy.", "reinit[")


def check(profile: Profile, again: Profile) -> None:
    """Check that sizes and features are the same, and that no time is shorter than it was.

    Times may be longer: how busy the machine is, is no part of this.
    """
    before, after = ({entry.key: entry for entry in entries(one)} for one in (profile, again))
    compared = compare(profile, again, 0, times=False)
    assert not compared.different, compared.different
    assert {"initial.bytes", "dirty", "stop_copy", "reinit"} <= set(compared.compared)
    for key, entry in before.items():
        if key.startswith(LAWS):
            continue
        assert key in after, f"{key} is not imported"
        if isinstance(entry.plain, Distribution) and entry.kind is SECONDS_SPREAD:
            found = after[key].plain
            assert found.count == entry.plain.count, key
            assert found.total >= entry.plain.total * 0.999, key
        elif entry.kind is SECONDS:
            assert after[key].plain >= entry.plain * 0.999, key
    found = differences(profile, again, Tolerance(time_part=1.0, time_least=3600.0), measured=True)
    assert not [one for one in found if not one.key.startswith(LAWS)], found


PLAIN = Profile(
    name="plain",
    origin="made-up",
    initial=Initial(Value.measured(4000)),
    dirty=Dirty(kind="none"),
    stop_copy=StopCopy(kind="following", extra_bytes=Value.measured(LEAST_STOP_COPY)),
)
REINIT = replace(PLAIN, reinits=(Reinit(Value.measured(REINIT_SECONDS), Value.measured(5000)),))


@settings(
    max_examples=6,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(profile=profiles())
@example(profile=REINIT)
def test_what_is_imported_from_a_replay_is_what_was_replayed(
    serve: ServerFactory, tmp_path: Path, profile: Profile
) -> None:
    for later in (1, 4, 16, 64, 256):
        reinits = tuple(
            replace(one, seconds=Value.measured(later * known(one.seconds))) for one in profile.reinits
        )
        moved = replace(profile, reinits=reinits)
        with contextlib.suppress(TooEarlyError):
            check(moved, loop(serve, tmp_path, moved, LAW_SECONDS))
            return
    pytest.fail("the initial data was never read before the REINIT")


def test_a_profile_of_other_sizes_is_not_the_same(serve: ServerFactory, tmp_path: Path) -> None:
    """The check finds a difference of a byte, and a missing value."""
    again = loop(serve, tmp_path, PLAIN)
    check(PLAIN, again)
    assert differences(
        replace(PLAIN, initial=Initial(Value.measured(4001))), again, Tolerance(), measured=True
    )
