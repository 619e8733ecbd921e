"""The state machine over the wire: every pair of states against `oracle.py`, failed arcs, resets."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Iterator

import pytest
from serverkit import RunningServer, ServerFactory
from streamkit import resume, save

from vfu_dev import uapi
from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.conformance import arcs as oracle
from vfu_dev.uapi import DeviceState, MigrationFlags

S = DeviceState
BAR0, BAR2, SCRATCH = 0, 2, 0x100


def passed(server: RunningServer, count_before: int) -> list[DeviceState]:
    """Return the states entered since the server had `count_before` transitions."""
    return [S[one["to"]] for one in server.status()["transitions"][count_before:]]


def enter(device: VfioUserDevice, state: DeviceState, stream: bytes) -> None:
    """Take a RUNNING device to `state`; in RESUMING a whole stream is written, so that arcs out work."""
    if state is not S.RUNNING:
        device.migration.set_state(state)
    if state is S.RESUMING:
        device.migration.write(stream)


@pytest.fixture
def stream(device: VfioUserDevice) -> bytes:
    """Return a whole stream that the fixture's own server accepts."""
    return save(device)


def test_every_pair_of_states(server: RunningServer, device: VfioUserDevice, stream: bytes) -> None:
    """Each SET passes a shortest path that the kernel's rules allow, or is refused and changes nothing."""
    migration = device.migration
    flags = migration.flags()
    assert MigrationFlags.VFIO_MIGRATION_PRE_COPY in flags
    tried = 0
    for start in sorted(oracle.states(flags)):
        for end in [*S, 8, 255, (1 << 32) - 1]:
            enter(device, start, stream)
            assert migration.get_state() is start
            count = len(server.status()["transitions"])
            allowed = oracle.paths(flags, start, S(end)) if end in set(S) else []
            if allowed:
                migration.set_state(S(end))
                assert passed(server, count) in allowed, (start, end)
                assert migration.get_state() is end
            else:
                data = struct.pack("<II", end, 0xFFFFFFFF)
                with pytest.raises(ClientCommandError) as caught:
                    migration.set(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, data)
                assert caught.value.errno == errno.EINVAL, (start, end)
                assert passed(server, count) == []
                assert migration.get_state() is start
            home(device, stream)
            tried += 1
    assert tried == len(oracle.states(flags)) * 11


def home(device: VfioUserDevice, stream: bytes) -> None:
    """Take the device back to RUNNING from anywhere."""
    state = device.migration.get_state()
    if state is S.RESUMING:
        with contextlib.suppress(
            ClientCommandError
        ):  # the whole stream is there already: nothing may follow it
            device.migration.write(stream)
    if state is not S.RUNNING:
        try:
            device.migration.set_state(S.RUNNING)
        except ClientCommandError:
            device.reset()
    assert device.migration.get_state() is S.RUNNING


def test_pre_copy_off_removes_its_states(serve: ServerFactory) -> None:
    server = serve("--pre-copy", "off")
    with server.connect() as device:
        flags = device.migration.flags()
        assert MigrationFlags.VFIO_MIGRATION_PRE_COPY not in flags
        assert MigrationFlags.VFIO_MIGRATION_STOP_COPY in flags
        assert not device.version.precopy_info
        assert not device.migration.probe(uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2)
        with pytest.raises(ClientCommandError):
            device.migration.set_state(S.PRE_COPY)
        assert device.migration.get_state() is S.RUNNING
        assert len(save(device)) > 0


def test_an_incomplete_stream_keeps_the_device_from_stopping(device: VfioUserDevice) -> None:
    """RESUMING -> STOP fails, the state stays; a reset then leads to RUNNING (QEMU relies on it)."""
    migration = device.migration
    migration.set_state(S.RESUMING)
    with pytest.raises(ClientCommandError) as caught:
        migration.set_state(S.RUNNING)
    assert caught.value.errno == errno.EINVAL
    assert migration.get_state() in (S.RESUMING, S.ERROR)
    device.reset()
    assert migration.get_state() is S.RUNNING


@pytest.mark.parametrize("state", [S.PRE_COPY, S.STOP, S.STOP_COPY, S.RESUMING])
def test_a_reset_leaves_the_migration_state_alone(device: VfioUserDevice, state: DeviceState) -> None:
    """Upstream libvfio-user keeps it since 4f4fce4: the guest may reset its device at any time."""
    device.migration.set_state(state)
    device.reset()
    assert device.migration.get_state() is state


def test_a_reset_in_pre_copy_does_not_end_the_migration(serve: ServerFactory) -> None:
    """Registers are reset, memory is not; the stream goes on and the destination accepts it."""
    source, destination = serve("--fill", "3"), serve()
    with source.connect() as device, destination.connect() as other:
        migration = device.migration
        device.region_write(BAR0, SCRATCH, b"\xaa" * 8)
        other.migration.set_state(S.RESUMING)
        migration.set_state(S.PRE_COPY)
        begin = migration.read(65536)
        device.reset()
        device.region_write(BAR0, SCRATCH + 8, b"\xbb" * 8)
        rest = save(device)
        resume(other, begin + rest, resuming=True)
        assert other.region_read(BAR0, SCRATCH, 8) == bytes(8)
        assert other.region_read(BAR0, SCRATCH + 8, 8) == b"\xbb" * 8
        assert other.region_read(BAR2, 0, 1 << 20) == device.region_read(BAR2, 0, 1 << 20)


@pytest.mark.parametrize("state", [S.PRE_COPY, S.STOP, S.STOP_COPY, S.RESUMING])
def test_a_lost_client_leaves_the_device_running(server: RunningServer, state: DeviceState) -> None:
    with server.connect() as device:
        device.migration.set_state(state)
        if state is S.PRE_COPY:
            device.migration.read(10)
    with server.connect() as device:
        assert device.migration.get_state() is S.RUNNING
        assert len(save(device)) > 0


def test_writes_are_refused_while_the_device_stands_still(device: VfioUserDevice) -> None:
    """STOP, STOP_COPY and RESUMING: the device does not change; reads are served; PRE_COPY serves all."""
    for state in (S.STOP, S.STOP_COPY, S.RESUMING, S.PRE_COPY):
        device.migration.set_state(state)
        before = device.region_read(BAR2, 0, 16)
        if state is S.PRE_COPY:
            device.region_write(BAR2, 0, bytes(16))
            assert device.region_read(BAR2, 0, 16) == bytes(16)
        else:
            with pytest.raises(ClientCommandError) as caught:
                device.region_write(BAR2, 0, b"x" * 16)
            assert caught.value.errno == errno.EBUSY
            device.region_write(BAR2, 0, b"y" * 16, posted=True)
            assert device.region_read(BAR2, 0, 16) == before
        if state is S.RESUMING:
            with pytest.raises(ClientCommandError):
                device.migration.set_state(S.STOP)
            device.reset()
        else:
            device.migration.set_state(S.RUNNING)


FEATURE_CASES = [
    (uapi.VFIO_DEVICE_FEATURE_MIGRATION, uapi.VFIO_DEVICE_FEATURE_GET, True),
    (uapi.VFIO_DEVICE_FEATURE_MIGRATION, uapi.VFIO_DEVICE_FEATURE_SET, False),
    (uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, uapi.VFIO_DEVICE_FEATURE_GET, True),
    (uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, uapi.VFIO_DEVICE_FEATURE_SET, True),
    (uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, 3 << 16, True),
    (uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, uapi.VFIO_DEVICE_FEATURE_SET, True),
    (uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, uapi.VFIO_DEVICE_FEATURE_GET, False),
    (uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, uapi.VFIO_DEVICE_FEATURE_SET, True),
    (uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, uapi.VFIO_DEVICE_FEATURE_GET, True),
    (uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, uapi.VFIO_DEVICE_FEATURE_GET, True),  # else QEMU assumes 100 GiB
    (uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, uapi.VFIO_DEVICE_FEATURE_SET, False),
    (uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, uapi.VFIO_DEVICE_FEATURE_SET, True),
    (3, uapi.VFIO_DEVICE_FEATURE_GET, False),  # LOW_POWER_ENTRY
    (0xFFFF, uapi.VFIO_DEVICE_FEATURE_GET, False),
]


@pytest.fixture
def probing(device: VfioUserDevice) -> Iterator[VfioUserDevice]:
    """Return the device; whatever is probed must not change its state."""
    yield device
    assert device.migration.get_state() is S.RUNNING


@pytest.mark.parametrize(("feature", "methods", "there"), FEATURE_CASES)
def test_probe_tells_which_features_there_are(
    probing: VfioUserDevice, feature: int, methods: int, there: bool
) -> None:
    assert probing.migration.probe(feature, methods) is there


def test_a_client_may_opt_in_to_reinit(device: VfioUserDevice) -> None:
    """MIG_PRECOPY_INFOv2 has no data; without new initial data the flags stay zero."""
    device.migration.enable_precopy_info_v2()
    device.migration.set_state(S.PRE_COPY)
    assert device.migration.precopy_info().flags == 0
    device.migration.set_state(S.RUNNING)


def test_get_and_set_at_once_are_refused(probing: VfioUserDevice) -> None:
    """They are mutually exclusive except with PROBE; neither of them is no request either."""
    for flags in (uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_SET, 0):
        with pytest.raises(ClientCommandError) as caught:
            probing.migration.feature(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | flags, bytes(8))
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("argsz", [8, 12, 15])
def test_set_counts_what_argsz_counts(device: VfioUserDevice, argsz: int) -> None:
    """A request that says it has less than a state has none: EINVAL, as in the kernel."""
    flags = uapi.VFIO_DEVICE_FEATURE_SET | uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
    request = struct.pack("<IIIi", argsz, flags, DeviceState.STOP, -1)
    with pytest.raises(ClientCommandError) as caught:
        device.connection.call(uapi.VFIO_USER_DEVICE_FEATURE, request, reply_bytes=64)
    assert caught.value.errno == errno.EINVAL
    assert device.migration.get_state() is DeviceState.RUNNING
