"""What the lab says of a move that stood still for too long, and of one that it cancelled."""

from __future__ import annotations

from vfu_dev.lab.judge import judge
from vfu_dev.lab.result import DeviceResult, MigrationResult


def late_move(**faults: dict[str, int]) -> MigrationResult:
    """Return a move that stood still for too long; `faults` are what its servers counted."""
    result = MigrationResult(devices=[DeviceResult(name="vfu0")])
    result.qemu.downtime_ms = 1534
    for side, counts in faults.items():
        getattr(result.devices[0], f"read_{side}")({"faults": counts})
    judge(result, None, verified=False)
    return result


def test_a_fault_that_happened_is_named() -> None:
    """It was asked for, so the machine is not to blame."""
    (warning,) = late_move(source={}, destination={"mig-write": 1, "mig-read": 2}).warnings
    assert warning == (
        "measured downtime 1534 ms, limit 300 ms (faults that were asked for happened: "
        "mig-write 1 time at vfu0's destination, mig-read 2 times at vfu0's destination)"
    )


def test_without_one_the_machine_may_be_busy() -> None:
    (warning,) = late_move().warnings
    assert warning == "measured downtime 1534 ms, limit 300 ms (is the machine busy?)"


def given_up(status: str, *, cancelled: bool, resume: str = "aborted") -> list[str]:
    """Return the problems of a move that did not end in time, and of which QEMU says `status`."""
    device = DeviceResult(name="vfu0", state_source="RUNNING")
    device.read_destination({"resume": {"status": resume, "error": "connection lost"}})
    result = MigrationResult(devices=[device], problems=["not finished within 6 s"])
    result.qemu.status, result.qemu.error, result.qemu.run_state_source = status, "Channel error", "running"
    judge(result, None, verified=False, cancelled=cancelled)
    return result.problems[1:]


def test_a_cancelled_migration_that_qemu_calls_failed_was_cancelled() -> None:
    """That its connection is lost is what the cancel did, and no other problem."""
    assert given_up("cancelled", cancelled=True) == []
    assert given_up("failed", cancelled=True) == [
        "QEMU calls the migration that was cancelled 'failed': Channel error"
    ]
    # What failed, and not by the cancel, is said.
    lost = "vfu0: destination's server: connection lost"
    assert given_up("cancelled", cancelled=True, resume="failed") == [lost]
    assert given_up("failed", cancelled=False) == ["QEMU says 'failed': Channel error", lost]
