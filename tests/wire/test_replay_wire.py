"""`serve --profile`: what a client sees of it, over a socket."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from serverkit import ANY_DOWNTIME, RunningServer, ServerFactory, run_vfu_dev, wait_until

from vfu_dev.client import ClientOptions, MigrationError, Migrator, VfioUserDevice
from vfu_dev.client.frames import Call, ClientCommandError
from vfu_dev.profile import Distribution, Value, read_profile
from vfu_dev.profile.model import Calls
from vfu_dev.profile.shipped import FOLDER, shipped
from vfu_dev.replay.contention import SharedResource, lock_path
from vfu_dev.replay.pace import more_seconds
from vfu_dev.uapi import DeviceState, MigrationFlags

HEAD = 'version = 1\nname = "test"\norigin = "made-up"\n'


@pytest.fixture
def served(serve: ServerFactory, tmp_path: Path) -> Callable[..., RunningServer]:
    """Return a function that serves a profile, given as text."""

    def start(text: str, *options: str, name: str = "a") -> RunningServer:
        path = tmp_path / f"{name}.toml"
        path.write_text(HEAD + text)
        return serve("--profile", str(path), *options)

    return start


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """Return how long a call takes."""
    begin = time.monotonic()
    function(*arguments)
    return time.monotonic() - begin


TIMED = """
[initial]
bytes = { assumed = "100K" }
[stop_copy]
kind = "following"
extra_bytes = { assumed = "32K" }
running_bytes = { assumed = "200K" }
[reads.initial]
bytes = { assumed = [[20480, 5]] }
seconds = { assumed = 0.01 }
first_seconds = { assumed = 0.05 }
[reads.stop_copy]
bytes = { assumed = 16384 }
seconds = { assumed = 0.02 }
[arcs.source]
"RUNNING->PRE_COPY" = { assumed = 0.06 }
"PRE_COPY->STOP_COPY" = { assumed = 0.07 }
[arcs.destination]
"RESUMING->RUNNING" = { assumed = 0.08 }
[loading]
initial_seconds = { assumed = 0.09 }
"""


def test_a_move_takes_at_least_what_the_profile_says(served: Callable[..., RunningServer]) -> None:
    """More than that is the machine's, and counted as late; sizes are exact."""
    servers = [served(TIMED, name=name) for name in ("source", "destination")]
    source, destination = (one.connect() for one in servers)
    with source, destination:
        assert source.migration.data_size() == 200 << 10
        assert seconds(source.migration.set_state, DeviceState.PRE_COPY) >= 0.06
        destination.migration.set_state(DeviceState.RESUMING)
        info = source.migration.precopy_info()
        assert (info.initial_bytes, info.dirty_bytes) == (100 << 10, 0)
        assert source.migration.data_size() == 132 << 10
        reads, writes = [], []
        for _ in range(5):
            began = time.monotonic()
            data = source.migration.read(1 << 20)
            reads.append(time.monotonic() - began)
            assert len(data) == 20480
            writes.append(seconds(destination.migration.write, data))
        assert reads[0] >= 0.05
        assert min(reads) >= 0.01
        assert writes[-1] >= 0.09
        assert seconds(source.migration.set_state, DeviceState.STOP_COPY) >= 0.07
        began = time.monotonic()
        sizes = []
        for chunk in iter(lambda: source.migration.read(1 << 20), b""):
            sizes.append(len(chunk))
            destination.migration.write(chunk)
        assert time.monotonic() - began >= 0.02 * len(sizes)
        assert sum(sizes) == 32 << 10
        source.migration.set_state(DeviceState.STOP)
        assert seconds(destination.migration.set_state, DeviceState.RUNNING) >= 0.08
        replays = [one.status()["replay"] for one in servers]
        assert [one["profile"] for one in replays] == ["test", "test"]
        assert [one["overshoot_bytes"] for one in replays] == [0, 0]
        assert replays[0]["calls"] == 5 + 2 + len(sizes)


SIZED = """
[initial]
bytes = { assumed = "80K" }
[stop_copy]
kind = "following"
extra_bytes = { assumed = "32K" }
[reads]
buffer_bytes = { assumed = "16K" }
[reads.initial]
bytes = { assumed = "16K" }
seconds = { assumed = 0.1 }
[writes.initial]
bytes = { assumed = "16K" }
seconds = { assumed = 0.1 }
"""


def test_a_call_of_other_sizes_is_never_faster_than_the_recorded_ones(
    served: Callable[..., RunningServer],
) -> None:
    """A quarter of a recorded call takes all of its time; four of them at once that of four."""
    source, destination = (served(SIZED, name=name).connect() for name in ("source", "destination"))
    with source, destination:
        source.migration.set_state(DeviceState.PRE_COPY)
        destination.migration.set_state(DeviceState.RESUMING)
        for asked, least in ((4 << 10, 0.1), (16 << 10, 0.1), (60 << 10, 0.375)):
            began = time.monotonic()
            data = source.migration.read(asked)
            assert time.monotonic() - began >= least
            assert len(data) == asked
            assert seconds(destination.migration.write, data) >= least


@pytest.mark.parametrize(("count", "more"), [(0, 0.0), (100, 0.0), (1000, 0.0), (2500, 0.3), (4000, 0.6)])
def test_a_larger_call_takes_further_recorded_ones(count: int, more: float) -> None:
    """As many as the bytes beyond the largest one make; a smaller call takes no less."""
    spread = Distribution(((10.0, 1), (1000.0, 3)))
    times = Distribution(((0.1, 1), (0.3, 1)))
    calls = Calls(Value.measured(spread), Value.measured(times))
    assert more_seconds(calls, count) == pytest.approx(more)
    assert more_seconds(Calls(seconds=Value.measured(times)), count) == 0.0


def refused(function: Callable[[], object]) -> int:
    """Return the errno with which a call is refused."""
    with pytest.raises(ClientCommandError) as caught:
        function()
    return caught.value.errno


def test_features_that_the_profiles_device_lacks(served: Callable[..., RunningServer]) -> None:
    server = served(
        "[features]\npre_copy = { measured = false }\np2p = { measured = false }\n"
        "data_size = { measured = false }\nprecopy_info_v2 = { measured = false }\n"
    )
    with server.connect() as device:
        assert device.migration.flags() == MigrationFlags.VFIO_MIGRATION_STOP_COPY
        assert refused(device.migration.data_size) == errno.ENOTTY
        assert refused(device.migration.enable_precopy_info_v2) == errno.ENOTTY


def test_a_read_before_initial_data_is_ready(served: Callable[..., RunningServer]) -> None:
    """An empty reply, as the specification has it: of a device that has stopped, initial data is ready."""
    server = served('[initial]\nbytes = { assumed = "4K" }\nready_seconds = { assumed = 10000.0 }\n')
    with server.connect() as device:
        device.migration.set_state(DeviceState.PRE_COPY)
        for _ in range(2):
            assert device.migration.read(4096) == b""
        device.migration.set_state(DeviceState.STOP_COPY)
        assert len(device.migration.read(4096)) == 4096


@pytest.mark.parametrize("kernels", [False, True])
def test_a_client_says_that_initial_data_is_what_it_waits_for(
    served: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    """What is left is below the threshold, and no reason to go on by itself.

    A server that passes on the errors of a VFIO device answers ENOMSG, which the specification allows.
    """
    late = '[initial]\nbytes = { assumed = "4K" }\nready_seconds = { assumed = 1000 }\n'
    source, destination = served(late), served(late, name="b")
    with source.connect() as device, destination.connect() as other:
        plain, empty = device.migration.finish_read, []

        def finish_read(call: Call) -> int:
            if (count := plain(call)) == 0:
                empty.append(call)
                if kernels:
                    raise ClientCommandError(call.command, errno.ENOMSG)
            return count

        monkeypatch.setattr(device.migration, "finish_read", finish_read)
        said = r"3 passes: remaining 4 KiB .*; 4 KiB of it is initial data, which is read first"
        with pytest.raises(MigrationError, match=said):
            Migrator(device, other, ClientOptions(max_passes=3)).run()
    assert len(empty) == 3


def test_a_client_takes_no_error_in_stop_copy_for_the_end(serve: ServerFactory) -> None:
    """ENOMSG means no data for now in PRE_COPY. In STOP_COPY it fails the migration."""
    source = serve("--fault", "op=mig-read,error=ENOMSG,state=STOP_COPY")
    with source.connect() as device, serve().connect() as other:
        with pytest.raises(MigrationError) as caught:
            Migrator(device, other, ANY_DOWNTIME).run()
        assert caught.value.phase == "stop-copy"
        assert isinstance(caught.value.__cause__, ClientCommandError)
        assert caught.value.__cause__.errno == errno.ENOMSG
        assert device.migration.get_state() is DeviceState.RUNNING


def test_devices_of_one_resource_wait_for_each_other(served: Callable[..., RunningServer]) -> None:
    """Two arcs of 0.3 s that need the whole of it take 0.6 s together, and both waited for the one before."""
    text = (
        f'[contention]\nresource = "test {os.getpid()}"\npart = {{ assumed = 1.0 }}\n'
        '[arcs.source]\n"RUNNING->PRE_COPY" = { assumed = 0.3 }\n'
    )
    servers = [served(text, name=name) for name in ("one", "two")]
    devices = [server.connect() for server in servers]
    threads = [
        threading.Thread(target=device.migration.set_state, args=(DeviceState.PRE_COPY,))
        for device in devices
    ]
    # Held here until both wait for it: else the first may be done before the second comes. What a device does
    # before it waits is a part of its 0.3 s. The devices do that one after the other, and it is counted.
    began = time.monotonic()
    with SharedResource(lock_path(f"test {os.getpid()}")) as ours:
        assert ours.take()
        for thread, server in zip(threads, servers, strict=True):
            thread.start()
            wait_until(lambda server=server: server.status()["state"] == "PRE_COPY", "it wants the resource")
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 0.6
    for device in devices:
        device.close()
    assert all(server.status()["replay"]["waited_seconds"] > 0.0 for server in servers)


NO_P2P = "[features]\np2p = { assumed = false }\n"


def test_a_call_of_which_the_server_is_relieved_does_not_hold_it_up(
    served: Callable[..., RunningServer],
) -> None:
    """An arc of hours, and one that waits for the first one's resource: both servers answer, and end."""
    text = (
        f'{NO_P2P}[contention]\nresource = "long {os.getpid()}"\npart = {{ assumed = 1.0 }}\n'
        '[arcs.source]\n"RUNNING->PRE_COPY" = { assumed = 10000.0 }\n'
    )
    servers = [served(text, name=name) for name in ("one", "two")]
    devices = [server.connect() for server in servers]
    threads = []
    for server, device in zip(servers, devices, strict=True):

        def ask(device: VfioUserDevice = device) -> None:
            with contextlib.suppress(Exception):  # its server ends meanwhile
                device.migration.set_state(DeviceState.PRE_COPY)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        wait_until(lambda server=server: server.status()["state"] == "PRE_COPY", "the arc is under way")
    for server in reversed(servers):
        server.stop()
    for thread in threads:
        thread.join()
    for device in devices:
        device.close()


def test_a_way_back_within_pre_copy_begins_no_session(served: Callable[..., RunningServer]) -> None:
    """The first read of a session has a time of its own: there is one."""
    server = served(
        '[initial]\nbytes = { assumed = "8K" }\n[reads.initial]\nfirst_seconds = { assumed = 0.001 }\n'
    )
    with server.connect() as device:
        calls = device.migration
        calls.set_state(DeviceState.PRE_COPY)
        assert len(calls.read(4096)) == 4096
        calls.set_state(DeviceState.PRE_COPY_P2P)
        calls.set_state(DeviceState.PRE_COPY)
        assert len(calls.read(4096)) == 4096
        assert server.status()["replay"]["calls"] == 1
        calls.set_state(DeviceState.RUNNING)
        calls.set_state(DeviceState.PRE_COPY)
        assert len(calls.read(4096)) == 4096
        assert server.status()["replay"]["calls"] == 2


def test_a_device_that_was_a_source_may_become_a_destination(served: Callable[..., RunningServer]) -> None:
    """Its arcs are then the destination's, also where the source has one of the same name."""
    text = (
        f'{NO_P2P}[arcs.source]\n"STOP->RUNNING" = {{ assumed = 0.0 }}\n'
        '[arcs.destination]\n"STOP->RUNNING" = { assumed = 0.001 }\n'
    )
    source, turned = (served(text, name=name) for name in ("source", "turned"))
    with source.connect() as one, turned.connect() as other:
        other.migration.set_state(DeviceState.PRE_COPY)
        other.migration.set_state(DeviceState.RUNNING)
        one.migration.set_state(DeviceState.STOP_COPY)
        other.migration.set_state(DeviceState.RESUMING)
        for data in iter(lambda: one.migration.read(1 << 20), b""):
            other.migration.write(data)
        other.migration.set_state(DeviceState.STOP)
        assert turned.status()["replay"]["calls"] == 0
        other.migration.set_state(DeviceState.RUNNING)
        assert turned.status()["replay"]["calls"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--scale", "2"), "--scale divides what a --profile says"),
        (("--profile", "nobody's"), "no shipped profile"),
    ],
)
def test_what_is_wrong_is_said(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run_vfu_dev("serve", "--socket", tmp_path / "s", *options)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_are_right(name: str) -> None:
    profile = read_profile(FOLDER / f"{name}.toml")
    assert profile.name == name
    assert profile.source
