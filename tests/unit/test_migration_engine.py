"""What becomes of a migration: failing arcs, ERROR, resets, and the records that tell of them."""

from __future__ import annotations

import pytest
from migrationkit import Box, filled, small_records  # noqa: F401 - an autouse fixture

from vfu_dev.errors import StateError
from vfu_dev.migration import TransitionError
from vfu_dev.uapi import DeviceState as S


def test_only_a_reset_leads_out_of_error() -> None:
    """ERROR ends the session, refuses every arc, and a reset leads to RUNNING."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    box.read(100)
    box.migration.fail("a test says so")
    record = box.migration.save_status()
    assert record is not None
    assert (record["status"], record["error"]) == ("failed", "a test says so")
    for target in S:
        with pytest.raises(TransitionError):
            box.migration.set_state(target)
    box.migration.reset(S.RUNNING, "reset")
    target = Box()
    target.load(box.save())
    assert target.snapshot() == box.snapshot()


def test_a_register_block_that_cannot_be_packed_fails_the_save_and_not_the_device() -> None:
    """A stream with a hole is not completed by a client that tries again; a later migration works."""
    box = filled()
    block = box.contents.blocks[0]
    working = block.pack

    def broken() -> bytes:
        raise RuntimeError("no registers today")

    object.__setattr__(block, "pack", broken)
    box.migration.set_state(S.STOP_COPY)
    with pytest.raises(RuntimeError, match="today"):
        box.read(1 << 20)
    with pytest.raises(Exception, match="no migration data to read"):
        box.read(1 << 20)
    record = box.migration.save_status()
    assert record is not None
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: no registers today")
    object.__setattr__(block, "pack", working)
    box.migration.reset(S.RUNNING, "reset")
    target = Box()
    target.load(box.save())
    assert target.snapshot() == box.snapshot()


def test_transitions_are_recorded_with_their_reason() -> None:
    box = Box()
    box.migration.set_state(S.STOP)
    box.migration.reset(S.RUNNING, "connection lost")
    assert [(t.origin, t.target, t.reason) for t in box.migration.transitions] == [
        (S.RUNNING, S.RUNNING_P2P, "requested"),
        (S.RUNNING_P2P, S.STOP, "requested"),
        (S.STOP, S.RUNNING, "connection lost"),
    ]


def test_a_reset_after_the_stream_was_read_does_not_spoil_its_digest() -> None:
    """The audit compares with the registers that were sent, and ends before the device runs again."""
    box = filled()
    box.migration.set_state(S.STOP_COPY)
    box.read_all()
    box.migration.set_state(S.STOP)
    box.registers[:] = 0
    box.migration.reset(S.RUNNING, "connection lost")
    box.memories[0].store(0, b"the device runs on")
    record = box.migration.save_status()
    assert record is not None
    assert (record["status"], record["audited"]) == ("completed", True)


def test_a_read_that_fails_in_pre_copy_refuses_stop_copy() -> None:
    """The arc is refused with the reason, the device stays where it is, and a second try works."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    rows, box.memories[0].rows = box.memories[0].rows, None  # type: ignore[assignment]
    raw, box.memories[0].raw = box.memories[0].raw, None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        box.read(1 << 20)
    box.memories[0].rows, box.memories[0].raw = rows, raw
    with pytest.raises(StateError, match="failed already: TypeError"):
        box.migration.set_state(S.STOP_COPY)
    assert box.migration.state in (S.PRE_COPY, S.PRE_COPY_P2P)
    box.migration.set_state(S.RUNNING)
    target = Box()
    target.load(box.save())
    assert target.snapshot() == box.snapshot()
