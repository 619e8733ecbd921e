"""What becomes of a migration: failing arcs, ERROR, resets, and the records that tell of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from migrationkit import PAGE, Box, filled

from vfu_dev.errors import StateError
from vfu_dev.figures import Interruption
from vfu_dev.migration import Migration, TransitionError
from vfu_dev.migration.fsm import ALL_FLAGS
from vfu_dev.migration.records import ADVICE
from vfu_dev.migration.save import SaveSession
from vfu_dev.uapi import DeviceState as S
from vfu_dev.uapi import MigrationFlags

pytestmark = pytest.mark.usefixtures("small_records")


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
    target.resume(box.save())
    assert target.snapshot() == box.snapshot()


def test_a_register_block_that_cannot_be_packed_fails_the_save_and_not_the_device() -> None:
    """A stream with a hole is not completed by a client that tries again; a later migration works."""
    box = filled()
    block = box.contents.blocks[0]

    def broken() -> bytes:
        raise RuntimeError("no registers today")

    box.contents.blocks = (replace(block, pack=broken),)
    box.migration.set_state(S.STOP_COPY)
    with pytest.raises(RuntimeError, match="today"):
        box.read(1 << 20)
    with pytest.raises(Exception, match="no migration data to read"):
        box.read(1 << 20)
    record = box.migration.save_status()
    assert record is not None
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: no registers today")
    box.contents.blocks = (block,)
    box.migration.reset(S.RUNNING, "reset")
    target = Box()
    target.resume(box.save())
    assert target.snapshot() == box.snapshot()


def test_the_last_scan_is_part_of_the_downtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is stopped when the client asks for it, not when what it takes is done."""
    box = filled()
    box.migration = Migration("box", box.contents, flags=ALL_FLAGS & ~MigrationFlags.VFIO_MIGRATION_P2P)
    box.migration.set_state(S.PRE_COPY)
    box.read(100)
    took = 0.05
    stop = SaveSession.stop

    def slowly(session: SaveSession) -> None:
        time.sleep(took)
        stop(session)

    monkeypatch.setattr(SaveSession, "stop", slowly)
    before = time.time()
    box.migration.set_state(S.STOP_COPY)
    after = time.time()
    assert before <= box.migration.transitions[-1].time <= after - took
    record = box.migration.save_status()
    assert record is not None
    assert before <= record["stopped"] <= after - took  # type: ignore[operator]
    while box.read(1 << 20):
        pass
    box.migration.set_state(S.STOP)
    for seconds in (
        box.migration.observer.last_downtime_seconds,
        box.migration.observer.last_stop_copy_seconds,
    ):
        assert seconds is not None
        assert seconds >= took


def test_transitions_are_recorded_with_their_reason() -> None:
    box = Box()
    box.migration.set_state(S.STOP)
    box.migration.reset(S.RUNNING, "connection lost")
    assert [(t.origin, t.target, t.reason) for t in box.migration.transitions] == [
        (S.RUNNING, S.RUNNING_P2P, "requested"),
        (S.RUNNING_P2P, S.STOP, "requested"),
        (S.STOP, S.RUNNING, "connection lost"),
    ]


def sent(**options: object) -> Box:
    """Return a box in STOP_COPY whose stream was read to its end: memory is still to be audited."""
    box = filled(**options)
    box.migration.set_state(S.STOP_COPY)
    box.read_all()
    return box


def test_nobody_who_asks_takes_part_in_an_audit() -> None:
    """It waits for the end of STOP_COPY, and goes on in the steps of the server's loop alone."""
    box = sent()
    for state in (S.STOP_COPY, S.STOP):
        box.migration.set_state(state)
        for _ in range(3):
            record = box.migration.save_status()
            assert record is not None
            status = "sent" if state is S.STOP_COPY else "completed"
            assert (record["status"], record["audited"]) == (status, False)
        assert box.migration.audit_pending == (state is S.STOP)
    assert box.finish_audit()["audited"] is True


def test_a_lost_client_does_not_end_an_audit() -> None:
    """The audit compares with the registers that were sent, and memory is as it was."""
    box = sent()
    box.registers[:] = 0
    box.migration.reset(S.RUNNING, "connection lost")
    record = box.finish_audit()
    assert (record["status"], record["audited"]) == ("sent", True)


def test_a_missed_mark_is_found_when_the_client_is_gone() -> None:
    box = sent()
    box.memories[0].raw[5 * PAGE] ^= 1  # nobody marks it
    box.migration.reset(S.RUNNING, "connection lost")
    record = box.finish_audit()
    assert (record["status"], record["audited"]) == ("failed", True)
    assert box.migration.observer.totals.audit_failures == 1


def write(box: Box) -> None:
    box.migration.reset(S.RUNNING, "connection lost")
    box.memories[0].store(0, b"the device runs on")


def clear(box: Box) -> None:
    box.migration.reset(S.RUNNING, "connection lost")
    box.memories[0].clear()


def stop(box: Box) -> None:
    box.migration.set_state(S.STOP)


def run_on(box: Box) -> None:
    box.migration.set_state(S.RUNNING)


def resume(box: Box) -> None:
    box.migration.set_state(S.RESUMING)


@pytest.mark.parametrize(
    ("change", "from_stop_copy", "from_stop"),
    [
        (write, "sent", "completed"),
        (clear, "sent", "completed"),
        (run_on, "aborted", "aborted"),
        (resume, "completed", "completed"),
    ],
)
def test_an_audit_is_given_up_where_memory_may_change(
    change: Callable[[Box], None], from_stop_copy: str, from_stop: str
) -> None:
    """That is no failure: what was sent was complete. An audit that was through stays what it was."""
    box, audited = sent(), sent()
    assert audited.audit()["audited"] is True
    for one, status, expected in ((box, from_stop_copy, None), (audited, from_stop, True)):
        change(one)
        record = one.finish_audit()
        assert (record["status"], record["audited"]) == (status, expected)
    assert box.migration.observer.totals.audit_failures == 0


def lose(box: Box) -> None:
    box.migration.reset(S.RUNNING, "connection lost")


def reset(box: Box) -> None:
    box.migration.reset(S.RUNNING, "reset: DEVICE")


def save_again(box: Box) -> None:
    box.migration.set_state(S.STOP_COPY)


# What the client does after the last byte, and what that makes of the migration: status and counter.
ENDS: dict[str, tuple[list[Callable[[Box], None]], str, str]] = {
    "leaves from STOP_COPY": ([lose], "sent", "sent"),
    "resets in STOP_COPY": ([reset], "sent", "sent"),
    "stops and leaves": ([stop, lose], "completed", "completed"),
    "stops and resets": ([stop, reset], "completed", "completed"),
    "stops and saves again": ([stop, save_again], "active", "completed"),
    "stops and resumes": ([stop, resume], "completed", "completed"),
    "goes back to RUNNING": ([run_on], "aborted", "cancelled"),
    "stops and goes back to RUNNING": ([stop, run_on], "aborted", "cancelled"),
}


@pytest.mark.parametrize(("steps", "status", "result"), ENDS.values(), ids=ENDS)
def test_a_migration_is_completed_when_the_client_stops_and_does_not_come_back(
    steps: list[Callable[[Box], None]], status: str, result: str
) -> None:
    """It is counted once, when its result is known, and that a client left is not taken for the end."""
    box = sent()
    saves = box.migration.observer.totals.saves
    assert sum(saves.values()) == 0
    for step in steps:
        assert sum(box.migration.observer.totals.saves.values()) == 0
        step(box)
    record = box.migration.save_status()
    assert record is not None
    assert record["status"] == status
    totals = box.migration.observer.totals
    assert {name for name, count in totals.saves.items() if count} == {result}
    assert totals.saves[result] == 1
    lose(box)
    assert sum(box.migration.observer.totals.saves.values()) == totals.saves_started


@pytest.mark.parametrize(
    ("reason", "result"),
    [
        (Interruption.DISCONNECTED, "disconnected"),
        ("connection lost", "disconnected"),
        (Interruption.RESET, "reset"),
        ("reset: PCI_FLR", "reset"),
        ("connections of a test", "reset"),
    ],
)
def test_a_migration_that_is_cut_off_is_counted_by_what_ended_it(reason: str, result: str) -> None:
    """On both sides, and the record says it in the same words."""
    source, target = filled(), Box()
    source.migration.set_state(S.PRE_COPY)
    target.migration.set_state(S.RESUMING)
    target.migration.write(memoryview(source.read(100)))
    for box in (source, target):
        box.migration.reset(S.RUNNING, reason)
        assert box.migration.transitions[-1].reason == str(reason)
    totals = (source.migration.observer.totals.saves, target.migration.observer.totals.resumes)
    for counted in totals:
        assert {name: count for name, count in counted.items() if count} == {result: 1}
    records = (source.migration.save_status(), target.migration.resume_status())
    assert [record and record["error"] for record in records] == [str(reason)] * 2


def test_a_client_that_stops_before_the_last_byte_completes_nothing() -> None:
    box = filled()
    box.migration.set_state(S.STOP_COPY)
    box.read(PAGE)
    box.migration.set_state(S.STOP)
    record = box.migration.save_status()
    assert record is not None
    assert record["status"] == "aborted"
    lose(box)
    assert box.migration.observer.totals.saves["cancelled"] == 1
    assert box.migration.observer.last_downtime_seconds is None


def test_a_mapped_memory_is_audited_only_while_the_device_is_stopped() -> None:
    """Whoever has it mapped can write to it after the connection is lost, and no page map shows it."""
    box = sent(pages=(64, 7), mapped=True)
    box.migration.reset(S.RUNNING, "connection lost")
    assert box.finish_audit()["audited"] is None
    assert sent(pages=(64, 7), mapped=True).audit()["audited"] is True


def test_what_was_not_completed_is_never_audited() -> None:
    """Whoever waits for `audited` does not wait for ever."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    record = box.migration.save_status()
    assert record is not None
    assert record["audited"] is False
    box.read(100)
    box.migration.fail("a test says so")
    assert box.finish_audit()["audited"] is None


def test_a_read_that_fails_in_pre_copy_refuses_stop_copy() -> None:
    """The arc is refused with the reason, the device stays where it is, and a second try works."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    pages, box.memories[0].pages = box.memories[0].pages, None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        box.read(1 << 20)
    box.memories[0].pages = pages
    with pytest.raises(StateError, match="failed already: AttributeError"):
        box.migration.set_state(S.STOP_COPY)
    assert box.migration.state in (S.PRE_COPY, S.PRE_COPY_P2P)
    box.migration.set_state(S.RUNNING)
    target = Box()
    target.resume(box.save())
    assert target.snapshot() == box.snapshot()


@pytest.mark.parametrize("status", ADVICE)
def test_the_log_warns_of_what_a_client_leaves_behind(status: str, caplog: pytest.LogCaptureFixture) -> None:
    """And only then: a client that goes back by itself knows what it does."""
    caplog.set_level("INFO")
    box = sent() if status == "sent" else filled()
    if status == "aborted":
        box.migration.set_state(S.PRE_COPY)
        box.migration.set_state(S.RUNNING)
        box.migration.set_state(S.PRE_COPY)
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    lose(box)
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert warning.getMessage().endswith(f", {status}; {ADVICE[status]}")
