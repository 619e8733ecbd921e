"""Migration states and the data descriptor: every pair of states, and what becomes of the sessions."""

from __future__ import annotations

import os

import pytest
from inside import Served, inside
from vfio import (
    DATA_SIZE,
    DEVICE_STATE,
    DMA_BUF,
    ERROR,
    GET,
    LOG_REPORT,
    LOG_START,
    LOG_STOP,
    MIGRATION,
    PATHS,
    PRE_COPY,
    PRE_COPY_P2P,
    PRECOPY_INFO_V2,
    PROBE,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SET,
    STOP,
    STOP_COPY,
    Attached,
    Device,
    Path,
    precopy_info,
    refused,
)
from vfiodriver import MEMORY_BAR

SAVING = (PRE_COPY, PRE_COPY_P2P, STOP_COPY)
STATES = (STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P)
# <linux/vfio.h>: "STOP_COPY -> PRE_COPY, STOP_COPY -> PRE_COPY_P2P: These arcs are not permitted".
FORBIDDEN = {(STOP_COPY, PRE_COPY), (STOP_COPY, PRE_COPY_P2P)}


def leave(device: Device) -> None:
    """Out of RESUMING and ERROR, as QEMU does it: with nothing written, the way on is refused; then reset."""
    if device.state() in (RESUMING, ERROR):
        assert refused(device.set_state, RUNNING) != "ok"
        device.reset()
    assert device.state() not in (RESUMING, ERROR)


def go(device: Device, state: int) -> int:
    """Bring the device to `state` from RUNNING; returns the data descriptor that is open there, or -1."""
    fd = -1
    leave(device)
    for step in (RUNNING, state):
        if device.state() != step:
            new = device.set_state(step)
            fd = new if new != -1 else fd
    return fd


def usable(fd: int, state: int) -> str:
    """What the data descriptor says of itself: a session that is over has no device."""
    if state == RESUMING:
        return refused(os.write, fd, b"")
    return refused(os.read, fd, 0)


@pytest.mark.parametrize("before", STATES)
@inside()
def test_data_descriptors_belong_to_sessions(before: int, served: Served) -> None:
    """A new one only where a session begins; -1 wherever none does; ENODEV from one whose session is over.

    QEMU passes a zeroed structure: without the -1 it would take descriptor 0 for the session's.
    """
    device = Attached("iommufd-cdev").device
    for after in STATES:
        fd = go(device, before)
        assert (fd >= 0) == (before in (*SAVING, RESUMING))
        begins = after != before and (after == RESUMING or (after in SAVING and before not in SAVING))
        if (before, after) in FORBIDDEN:
            assert refused(device.set_state, after) == "EINVAL"
            assert device.state() == before
            assert usable(fd, before) == "ok"
        elif before == RESUMING and after != RESUMING:
            # What was written is nothing, and no state to run on.
            assert refused(device.set_state, after) != "ok"
            assert usable(fd, before) in ("ok", "ENODEV")
        else:
            new = device.set_state(after)
            assert (new >= 0) == begins, (before, after)
            assert device.state() == after
            if fd >= 0:
                goes_on = after == before or (before in SAVING and after in SAVING)
                assert usable(fd, before) == ("ok" if goes_on else "ENODEV")
            if new >= 0:
                assert usable(new, after) == "ok"
                os.close(new)
        if fd >= 0:
            os.close(fd)
        leave(device)


@inside()
def test_a_state_that_there_is_not_is_einval_and_nothing_changes(served: Served) -> None:
    device = Attached("iommufd-cdev").device
    fd = go(device, PRE_COPY)
    for state in (ERROR, 8, 0xFFFFFFFF):
        assert refused(device.set_state, state) == "EINVAL"
        assert device.state() == PRE_COPY
    assert precopy_info(fd)[1] > 0


@inside()
def test_features_are_asked_for_as_in_the_kernel(served: Served) -> None:
    """PROBE succeeds for what there is, with a method that it has; EINVAL otherwise, ENOTTY for none."""
    device = Attached("iommufd-cdev").device
    have = {
        MIGRATION: GET, DEVICE_STATE: GET | SET, LOG_START: SET, LOG_STOP: SET, LOG_REPORT: GET,
        DATA_SIZE: GET,
        PRECOPY_INFO_V2: SET,
    }  # fmt: skip
    for feature in range(16):
        for method in (0, GET, SET, GET | SET):
            expected = "ENOTTY" if feature not in have else "EINVAL" if method & ~have[feature] else "ok"
            assert refused(device.feature, PROBE | method | feature) == expected, (feature, method)
    assert DMA_BUF not in have
    assert refused(device.feature, MIGRATION) == "EINVAL"  # no method
    assert refused(device.feature, GET | SET | DEVICE_STATE, "Ii", 0, 0) == "EINVAL"
    assert refused(device.feature, GET | 1 << 20 | MIGRATION, "Q", 0) == "EINVAL"
    assert refused(device.feature, GET | MIGRATION, "I", 0) == "EINVAL"  # too short
    assert refused(device.feature, SET | MIGRATION, "Q", 0) == "EINVAL"


@pytest.mark.parametrize("path", PATHS)
@inside()
def test_what_the_device_can_do(path: Path, served: Served) -> None:
    device = Attached(path).device
    assert device.migration_flags() == 0x7
    assert device.state() == RUNNING
    device.write(MEMORY_BAR, 0, os.urandom(served.memory_bytes))
    assert device.data_size() > served.memory_bytes


@inside()
def test_a_closed_descriptor_lets_the_next_session_begin(served: Served) -> None:
    """QEMU closes it after each migration, cancelled or not."""
    device = Attached("iommufd-cdev").device
    device.write(MEMORY_BAR, 0, os.urandom(8192))
    for _ in range(3):
        fd = device.set_state(PRE_COPY)
        assert len(os.read(fd, 1000)) == 1000
        assert device.set_state(RUNNING) == -1
        os.close(fd)
    fd = device.set_state(PRE_COPY)
    os.close(fd)
    assert refused(os.read, fd, 1) == "EBADF"
    assert device.set_state(PRE_COPY_P2P) == -1  # still the same session, which nobody can read
    assert device.set_state(RUNNING) == -1


@inside()
def test_a_reset_during_pre_copy_leaves_the_migration_alone(served: Served) -> None:
    """The guest may reset its device while it is migrated; the session goes on."""
    device = Attached("iommufd-cdev").device
    device.write(MEMORY_BAR, 0, os.urandom(8192))
    fd = device.set_state(PRE_COPY)
    device.reset()
    assert device.state() == PRE_COPY
    assert len(os.read(fd, 4096)) == 4096


@inside()
def test_without_a_free_descriptor_nothing_has_happened(served: Served) -> None:
    """EMFILE, and the device is where it was."""
    import resource

    device = Attached("iommufd-cdev").device
    taken = []
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    while refused(os.dup, 0) == "ok":
        taken.append(os.dup(0) if refused(os.dup, 0) == "ok" else 0)
    assert refused(device.set_state, PRE_COPY) == "EMFILE"
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    assert device.state() == RUNNING
    assert device.set_state(PRE_COPY) >= 0
