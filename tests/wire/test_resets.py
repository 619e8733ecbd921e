"""Every way to reset the device, in every migration state: what is lost, what stays, and that it goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pcikit
import pytest
from serverkit import RunningServer, ServerFactory, server_farm, short_folder, wait_until
from streamkit import abandon_resume, read_all, resume, save

from vfu_dev.builds import artifact
from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.uapi import DeviceState

S = DeviceState
BAR0, BAR2, CTRL, SCRATCH = 0, 2, 0x18, 0x100
MEMORY_BYTES = 64 << 10
CONTENT = bytes(range(256)) * (MEMORY_BYTES // 256)
NOTE = b"\xaa" * 16
RUNNING = {S.RUNNING, S.RUNNING_P2P, S.PRE_COPY, S.PRE_COPY_P2P}  # where a guest's writes are taken
ERROR_FAULT = "op=transition,broken=yes,to=RUNNING_P2P"


@dataclass(frozen=True)
class Way:
    """How a device is reset.

    Attributes:
        apply: does it.
        registers: whether it resets them in all states, not only where the device takes writes.
        config: whether configuration space is reset.
        migration: the state it leads to, from the one before.
    """

    apply: Callable[[VfioUserDevice], None]
    registers: bool
    config: bool
    migration: Callable[[DeviceState], DeviceState]


def soft_reset(device: VfioUserDevice) -> None:
    device.region_write(BAR0, CTRL, b"\x01\0\0\0")


def out_of_error(state: DeviceState) -> DeviceState:
    """A reset leads out of ERROR (<linux/vfio.h>), and leaves other states alone (libvfio-user 4f4fce4)."""
    return S.RUNNING if state is S.ERROR else state


WAYS = {
    "request": Way(VfioUserDevice.reset, True, True, out_of_error),
    "function": Way(pcikit.function_reset, True, True, out_of_error),
    "soft": Way(soft_reset, False, False, lambda state: state),
    "lost": Way(VfioUserDevice.close, True, True, lambda _: S.RUNNING),
}


@pytest.fixture(scope="module")
def farm(library: Path) -> Iterator[ServerFactory]:
    """Start servers that live as long as this module."""
    with short_folder() as folder, server_farm(library, folder) as factory:
        yield factory


@pytest.fixture(scope="module")
def subject(farm: ServerFactory) -> RunningServer:
    """The device that is reset."""
    return farm(memory=str(MEMORY_BYTES))


@pytest.fixture(scope="module")
def other(farm: ServerFactory) -> RunningServer:
    """The device that it is migrated to."""
    return farm(memory=str(MEMORY_BYTES))


@pytest.fixture(scope="module")
def stream(other: RunningServer) -> bytes:
    """A stream for RESUMING."""
    with other.connect() as device:
        return save(device)


def enter(server: RunningServer, device: VfioUserDevice, state: DeviceState, stream: bytes) -> None:
    """Take a RUNNING device to `state`, in the middle of what it does there."""
    if state is S.ERROR:
        with server.control() as control:
            control.command("fault", fault=ERROR_FAULT)
            with pytest.raises(ClientCommandError):
                device.migration.set_state(S.RUNNING_P2P)
            control.command("fault", clear="all")
    elif state is not S.RUNNING:
        device.migration.set_state(state)
    if state is S.RESUMING:
        device.migration.write(stream[: len(stream) // 2])
    assert device.migration.get_state() is state


@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
@pytest.mark.parametrize("name", WAYS)
def test_reset(
    subject: RunningServer, other: RunningServer, stream: bytes, name: str, state: DeviceState
) -> None:
    """Registers and configuration space start anew, memory stays, the migration goes on or can begin again.

    A soft reset is a register write: refused where the device does not take any. A load that loses its client
    leaves zeros, not half a state.
    """
    way = WAYS[name]
    with subject.connect() as device:
        initial = [bytes(device.region_read(7, 0, 256))]
        device.region_write(BAR2, 0, CONTENT)
        device.region_write(BAR0, SCRATCH, NOTE)
        pcikit.write(device, pcikit.COMMAND, 0x6)
        pcikit.write(device, pcikit.INTERRUPT_LINE, 0x2A, 1)
        initial.append(bytes(device.region_read(7, 0, 256)))
        assert initial[0] != initial[1]
        enter(subject, device, state, stream)
        resets = subject.status()["counters"]["resets"]
        works = way.registers or state in RUNNING
        if works:
            way.apply(device)
        else:
            with pytest.raises(ClientCommandError) as caught:
                way.apply(device)
            assert caught.value.errno == errno.EBUSY
        if way.apply is VfioUserDevice.close:
            wait_until(lambda: not subject.status()["connected"], "the server notices")
            device = subject.connect()
        with device:
            after = way.migration(state)
            assert device.migration.get_state() is after
            assert subject.status()["counters"]["resets"] == resets + way.config
            assert device.region_read(BAR0, SCRATCH, len(NOTE)) == (bytes(len(NOTE)) if works else NOTE)
            assert device.region_read(7, 0, 256) == initial[0 if way.config else 1]
            lost_load = state is S.RESUMING and after is not S.RESUMING
            if state is not S.RESUMING:
                assert device.region_read(BAR2, 0, MEMORY_BYTES) == CONTENT
            elif lost_load:
                assert device.region_read(BAR2, 0, MEMORY_BYTES) == bytes(MEMORY_BYTES)
            goes_on(device, other, after, stream)


def goes_on(device: VfioUserDevice, other: RunningServer, state: DeviceState, stream: bytes) -> None:
    """What the device was at comes to its end; then it can be migrated away."""
    if state is S.RESUMING:
        device.migration.write(stream[len(stream) // 2 :])
        device.migration.set_state(S.RUNNING)
    elif state is S.ERROR:
        with pytest.raises(ClientCommandError):
            device.migration.set_state(S.RUNNING)
        device.reset()
    begun = state in (S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY)
    with other.connect() as target:
        sent = read_all(device, 4096) if begun else b""
        resume(target, sent + (b"" if state is S.STOP_COPY else save(device)))
        if state is S.STOP_COPY:
            device.migration.set_state(S.RUNNING)
        assert target.region_read(BAR2, 0, MEMORY_BYTES) == device.region_read(BAR2, 0, MEMORY_BYTES)
        assert target.region_read(BAR0, SCRATCH, 16) == device.region_read(BAR0, SCRATCH, 16)


def test_a_failed_load_is_left_by_a_function_reset_too(other: RunningServer) -> None:
    """A reset right after an arc that failed leads to RUNNING, whoever asked for it: QEMU's way back."""
    with other.connect() as device:
        device.migration.set_state(S.RESUMING)
        device.migration.write(b"no stream at all" * 4) if False else None
        with pytest.raises(ClientCommandError):
            device.migration.set_state(S.STOP)
        pcikit.function_reset(device)
        assert device.migration.get_state() is S.RUNNING
        abandon_resume(device)


def test_a_function_reset_needs_no_library_of_ours(farm: ServerFactory) -> None:
    """Upstream's version 2 gets no notice, and needs none: the device is reset."""
    reduced = artifact("libvfio-user-reduced", build=True)
    with farm("--library", str(reduced), memory=str(MEMORY_BYTES)).connect() as device:
        device.region_write(BAR0, SCRATCH, NOTE)
        device.migration.set_state(S.STOP)
        pcikit.function_reset(device)
        assert device.region_read(BAR0, SCRATCH, len(NOTE)) == bytes(len(NOTE))
        assert device.migration.get_state() is S.STOP
