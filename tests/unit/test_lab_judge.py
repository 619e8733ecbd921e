"""What the lab says of a move whose downtime was above the limit: why, where it can be known."""

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
        "downtime 1534 ms, limit 300 ms (faults that were asked for happened: "
        "mig-write 1 time at vfu0's destination, mig-read 2 times at vfu0's destination)"
    )


def test_without_one_the_machine_may_be_busy() -> None:
    (warning,) = late_move().warnings
    assert warning == "downtime 1534 ms, limit 300 ms (is the machine busy?)"
