"""The sentence that says whether a migration converges, and what QEMU would accept."""

from __future__ import annotations

from typing import Any

import pytest

from vfu_dev.lab.convergence import Limits, assess, qemu_threshold_bytes
from vfu_dev.model.link import steps_note

MIB = 1 << 20


def forecast(
    dirty: float | None, transfer: float | None, left: int | None, converging: bool | None = None
) -> dict[str, Any]:
    """Return the figures of one server that decide."""
    return {
        "converging": converging,
        "dirty_rate_bytes_per_second": dirty,
        "transfer_rate_bytes_per_second": transfer,
        "stop_copy_length_bytes": left,
        "predicted_downtime_seconds": None if left is None else 0.25,
    }


def test_threshold_is_bandwidth_times_limit() -> None:
    """The bandwidth told for the switchover wins over the one that QEMU measured; without either, unknown."""
    reply = {"ram": {"mbps": 80.0}}
    assert qemu_threshold_bytes({"avail_switchover_bandwidth": 10 * MIB}, 300, reply) == 3 * MIB
    assert qemu_threshold_bytes({"max_bandwidth": MIB}, 300, reply) == pytest.approx(3_000_000)
    assert qemu_threshold_bytes({}, 300, {}) is None


def test_dirtying_faster_than_the_link_is_said_with_its_numbers() -> None:
    """Dirty rate, transfer rate, ratio, what remains and the threshold are in one sentence."""
    found = assess([forecast(40 * MIB, 10 * MIB, 3 * MIB, False)], {"ram": {"remaining": MIB}}, 2 * MIB)
    assert found.converging is False
    assert found.ratio == 0.25
    assert found.text == (
        "not converging: dirty rate 40 MiB/s > transfer rate 10 MiB/s (ratio 0.25), "
        "remaining 4 MiB > threshold 2 MiB"
    )
    assert found.to_json()["text"] == found.text


def test_ram_first() -> None:
    """While QEMU is busy with RAM the device's rate says little, and the sentence says that."""
    found = assess([forecast(4 * MIB, MIB, 3 * MIB)], {"ram": {"remaining": 100 * MIB}}, MIB)
    assert found.converging is None
    assert found.text.startswith(
        "too early to tell, QEMU sends RAM: dirty rate 4 MiB/s > transfer rate 1 MiB/s"
    )
    later = assess([forecast(4 * MIB, MIB, 3 * MIB)], {"ram": {"remaining": 0}}, MIB)
    assert later.text.startswith("too early to tell: dirty rate 4 MiB/s > transfer rate 1 MiB/s")


def test_converging_says_whether_it_fits() -> None:
    """A link that outruns the dirtying converges; what remains is compared with the threshold."""
    far = assess([forecast(MIB, 10 * MIB, 3 * MIB)], {}, 2 * MIB)
    near = assess([forecast(MIB, 10 * MIB, MIB)], {}, 2 * MIB)
    assert far.converging
    assert far.text.startswith("converging: dirty rate 1 MiB/s < transfer rate 10 MiB/s (ratio 10.00)")
    assert far.text.endswith("remaining 3 MiB > threshold 2 MiB")
    assert near.text.endswith("remaining 1 MiB <= threshold 2 MiB")


def test_nothing_left_to_send_and_too_much_to_stop_with_is_said() -> None:
    """A device whose stop_copy_length is above the threshold with all read: QEMU measures next to nothing."""
    left = forecast(None, None, 14 * MIB) | {"initial_bytes": 0, "dirty_bytes": 0}
    limits = Limits.of({}, 2000)
    found = assess([left], {"ram": {"remaining": 0}}, 322 << 10, limits)
    assert found.converging is None
    assert found.precopy_bytes == 0
    assert found.text == (
        "waiting: nothing is left for PRE_COPY, and STOP_COPY has too much, "
        "remaining 14 MiB > threshold 322 KiB (measured 161 KiB/s x 2000 ms)"
    )
    busy = assess([left, left | {"dirty_bytes": 4096}], {"ram": {"remaining": 0}}, 322 << 10, limits)
    assert busy.text.startswith("measuring rates")
    ram = assess([left], {"ram": {"remaining": 4096}}, 322 << 10, limits)
    assert (ram.precopy_bytes, ram.text.startswith("measuring rates")) == (4096, True)
    near = assess([left], {"ram": {"remaining": 0}}, 15 * MIB, limits)
    assert near.text.startswith("measuring rates, remaining 14 MiB <= threshold")


def test_devices_share_the_link() -> None:
    """Rates and remains of two devices are added; one device without rates leaves the question open."""
    both = assess([forecast(6 * MIB, 5 * MIB, MIB), forecast(2 * MIB, 5 * MIB, MIB)], {}, None)
    assert (both.converging, both.ratio, both.remaining_bytes) == (True, 1.25, 2 * MIB)
    assert both.predicted_downtime_seconds == 0.5
    stuck = assess([forecast(6 * MIB, 2 * MIB, MIB, False), forecast(2 * MIB, 5 * MIB, MIB, True)], {}, None)
    assert stuck.converging is False
    unknown = assess([forecast(6 * MIB, 5 * MIB, MIB), forecast(None, None, MIB)], {}, 3 * MIB)
    assert unknown.converging is None
    assert unknown.text == "measuring rates, remaining 2 MiB <= threshold 3 MiB"


def test_nothing_written_converges_without_a_ratio() -> None:
    """JSON has no infinity."""
    found = assess([forecast(0.0, MIB, 0)], {}, MIB)
    assert found.converging
    assert found.ratio is None
    assert found.text.startswith("converging: dirty rate 0 B/s < transfer rate 1 MiB/s, remaining 0 B")


def test_the_sentence_says_what_the_numbers_are_made_of() -> None:
    """QEMU's steps where the limit is none of them; whose bandwidth the threshold reckons with."""
    told = Limits.of({"max_bandwidth": 4 * MIB, "avail_switchover_bandwidth": 4 * MIB}, 300)
    found = assess([forecast(40 * MIB, 10 * MIB, 3 * MIB, False)], {}, 1.2 * MIB, told)
    assert found.text == (
        "not converging: dirty rate 40 MiB/s > transfer rate 10 MiB/s "
        "(max-bandwidth 4 MiB/s, in QEMU's steps of 10 MiB/s) (ratio 0.25), "
        "remaining 3 MiB > threshold 1.2 MiB (avail-switchover-bandwidth 4 MiB/s x 300 ms)"
    )
    measured = Limits.of({"max_bandwidth": 20 * MIB}, 100)
    found = assess([forecast(MIB, 20 * MIB, MIB)], {}, 2 * MIB, measured)
    assert found.text.endswith("remaining 1 MiB <= threshold 2 MiB (measured 20 MiB/s x 100 ms)")
    assert "max-bandwidth" not in found.text
    assert steps_note(0) == ""
