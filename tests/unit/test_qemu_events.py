"""What lines of each version of QEMU are read as. The table of them: tests/lab/test_lab_qemu_events.py."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vfu_dev.qemu_events import EVENTS, OLDEST, Kind, kind_of, read
from vfu_dev.vm.trace import KEPT_REPEATS, parse_trace, states_set

# Lines as each version's log backend wrote them here, with `-msg timestamp=on`.
LINES = {
    "10.0": """\
23529@1795710742.662830:vfio_migration_set_state  (a.sock.vfio) new state RUNNING_P2P, recover state ERROR
23529@1795710742.663104:vfio_migration_set_device_state  (a.sock.vfio) state RUNNING_P2P
23529@1795710742.700000:vfio_state_pending_exact  (a.sock.vfio) precopy 1163517 postcopy 0 \
stopcopy size 1163517 precopy initial size 1059912 precopy dirty size 102532
""",
    "11.1": """\
2026-11-26T16:32:22.662830Z vfio_migration_set_state  (a.sock.vfio) new state RUNNING_P2P, recover state ERROR
2026-11-26T16:32:22.663104Z vfio_migration_set_device_state  (a.sock.vfio) state RUNNING_P2P
2026-11-26T16:32:22.700000Z vfio_state_pending  (a.sock.vfio) stopcopy size 1163517, \
precopy initial size 1059912, precopy dirty size 102532, request switchover ack 0, exact 1, final 0
""",
}


@pytest.mark.parametrize("version", LINES)
def test_both_forms_of_a_line_are_read_as_the_same(version: str, tmp_path: Path) -> None:
    """Time, device, kind, sizes and states; a state that goes to the device as well is one state."""
    log = tmp_path / "trace.log"
    log.write_text(LINES[version])
    events = parse_trace(log)
    assert [event.kind for event in events] == [Kind.STATE, Kind.DEVICE_STATE, Kind.PENDING_EXACT]
    assert {event.device for event in events} == {"a.sock.vfio"}
    assert states_set(events) == ["RUNNING_P2P"]
    assert events[0].time == pytest.approx(
        datetime(2026, 11, 26, 16, 32, 22, 662830, UTC).timestamp(), abs=1e-5
    )
    sizes = {key: events[2].values[key] for key in ("stop_copy", "initial", "dirty")}
    assert sizes == {"stop_copy": 1163517, "initial": 1059912, "dirty": 102532}


SPINS = {
    "10.0": """\
7@{seconds:.6f}:vfio_state_pending_estimate  ({device}) precopy 0 postcopy 0 precopy initial size 0 \
precopy dirty size {left}
7@{seconds:.6f}:vfio_state_pending_exact  ({device}) precopy {left} postcopy 0 stopcopy size {left} \
precopy initial size 0 precopy dirty size 0
7@{seconds:.6f}:vfio_save_iterate  ({device}) precopy initial size 0 precopy dirty size {left}
""",
    "11.1": """\
{stamp} vfio_query_stop_copy_size  ({device}) stopcopy size {left} ret 0
{stamp} vfio_state_pending  ({device}) stopcopy size {left}, precopy initial size 0, precopy dirty size 0, \
request switchover ack 0, exact 0, final 0
{stamp} vfio_state_pending  ({device}) stopcopy size {left}, precopy initial size 0, precopy dirty size 0, \
request switchover ack 0, exact 1, final 0
""",
}
LATER = {
    "10.0": "7@1800000000.000000:vfio_migration_set_state  (a) new state STOP_COPY, recover state STOP\n",
    "11.1": "2027-01-15T08:00:00.000000Z vfio_migration_set_state (a) new state STOP_COPY, recover state X\n",
}


@pytest.mark.parametrize("version", SPINS)
def test_a_qemu_that_waits_leaves_few_events(version: str, tmp_path: Path) -> None:
    """Of 10 000 equal answers of two devices the first and the last stand, and how many are left out."""

    def turn(number: int, left: int) -> str:
        stamp = datetime.fromtimestamp(1700000000 + number / 100, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return "".join(
            SPINS[version].format(seconds=1700000000 + number / 100, stamp=stamp, device=device, left=left)
            for device in ("a", "b")
        )

    log = tmp_path / "trace.log"
    log.write_text(
        "".join(turn(number, 700) for number in range(10_000))
        + "".join(turn(number, 800) for number in range(10_000, 10_003))
        + LATER[version]
    )
    events = parse_trace(log)
    lines = log.read_text().count("\n")
    assert len(events) + sum(event.repeated for event in events) == lines
    assert len(events) == 6 * (1 + KEPT_REPEATS + 1) + 6 * 3 + 1
    times = [event.time or 0.0 for event in events]
    assert times == sorted(times)
    for device in ("a", "b"):
        exact = [one for one in events if one.kind is Kind.PENDING_EXACT and one.device == device]
        assert [one.values["stop_copy"] for one in exact] == [700] * (2 + KEPT_REPEATS) + [800] * 3
        last = exact[1 + KEPT_REPEATS]
        assert last.repeated == 10_000 - 2 - KEPT_REPEATS
        assert last.time == pytest.approx(1700000099.99)
        assert last.to_json()["repeated"] == last.repeated
    assert "repeated" not in events[0].to_json()
    assert states_set(events) == ["STOP_COPY"]


def test_what_is_moved_is_never_left_out(tmp_path: Path) -> None:
    """Reads of one size are each a read, and end a row of equal answers."""
    answer = "2026-11-26T16:32:22.700000Z vfio_save_iterate (a) precopy initial size 0 precopy dirty size 9\n"
    block = "2026-11-26T16:32:22.700000Z vfio_save_block (a) data_size 4096\n"
    log = tmp_path / "trace.log"
    log.write_text((block + answer) * 100)
    events = parse_trace(log)
    assert [event.kind for event in events] == [Kind.BLOCK, Kind.ITERATE] * 100
    assert not any(event.repeated for event in events)


@pytest.mark.parametrize(("exact", "kind"), [(0, Kind.PENDING_ESTIMATE), (1, Kind.PENDING_EXACT)])
def test_one_event_of_11_1_is_two_kinds(exact: int, kind: Kind) -> None:
    text = (
        "stopcopy size 1, precopy initial size 2, precopy dirty size 3, request switchover ack 1, "
        f"exact {exact}, final 0"
    )
    found, values = read("vfio_state_pending", text)
    assert found == kind
    assert values["request_ack"] == "1"


def test_an_event_that_is_not_in_the_table_has_no_kind() -> None:
    assert read("vfio_region_setup", "") == (None, {})
    assert read("vfio_save_iterate", "some other text") == (None, {})
    assert read("vfio_save_cleanup", "some other text") == (None, {})


def test_every_event_of_the_table_is_read_from_a_line_of_its_own() -> None:
    """A number for each number, a word for each word; the words may have colons, slashes and hyphens."""
    for event in EVENTS:
        text, numbers = event.text, 0
        for conversion in ("%lu", "%lx", "%u", "%d"):
            numbers += text.count(conversion)
            text = text.replace(conversion, "7")
        kind, values = read(event.name, text.replace("%s", "0000:00:04.0/finish-migrate"))
        assert kind in (event.kind, Kind.PENDING_EXACT), event.name
        assert set(values) == set(event.fields) - {""}, event.name
        assert all(value in ("7", "0000:00:04.0/finish-migrate") for value in values.values())
        for earlier in event.earlier:
            form = re.sub(r"%lx|%lu|%u|%d", "7", earlier.text).replace("%s", "RUNNING")
            kind, values = read(event.name, form)
            assert (kind, set(values)) == (earlier.kind, set(earlier.fields) - {""}), earlier.text
            assert set(values.values()) <= {"7", "RUNNING"}, "a number is decimal"


def test_reports_without_kinds_are_read_by_name() -> None:
    """As those of earlier versions are."""
    assert kind_of({"event": "vfio_state_pending_exact"}) == "pending-exact"
    assert kind_of({"event": "vfio_state_pending", "kind": "pending-estimate"}) == "pending-estimate"
    assert kind_of({"event": "vfio_region_setup"}) is None


def test_every_conversion_has_a_field() -> None:
    for event in EVENTS:
        assert event.text.count("%") == len(event.fields), event.name
        assert event.since >= OLDEST
        assert event.pattern.groups == sum(1 for field in event.fields if field)
