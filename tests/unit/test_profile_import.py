"""Profiles from traces: of each version, of either side, whole, in pieces, and from somebody hostile."""

from __future__ import annotations

import functools
import gzip
import io
import lzma
import re
import struct
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracekit import DEVICE, HEADER, Event, lines, move, recorded, simple

from vfu_dev.errors import ConfigError
from vfu_dev.profile import Distribution, Mark, Profile, Value, profile_text
from vfu_dev.profile.compare import Tolerance, differences
from vfu_dev.profile.from_qemu import MAX_DEVICES
from vfu_dev.profile.importing import Wanted, import_profile
from vfu_dev.profile.model import Calls, DmaLogging, MigrationSettings
from vfu_dev.profile.session import PHASES
from vfu_dev.qemu_events import EVENTS
from vfu_dev.qemu_trace import read_log, read_simple, split_line

RELEASES = ("10.0", "10.2", "11.1")
Import = Callable[..., Profile]


@pytest.fixture
def imported(tmp_path: Path) -> Import:
    """Import traces given as text or bytes; `notes` collects what is to be noted."""

    def run(
        *traces: str | bytes,
        device: str | None = None,
        migration: int | None = None,
        lenient: bool = False,
        notes: list[str] | None = None,
    ) -> Profile:
        paths = []
        for number, trace in enumerate(traces):
            paths.append(tmp_path / f"trace{number}")
            paths[-1].write_bytes(trace.encode() if isinstance(trace, str) else trace)
        profile, said = import_profile(paths, "it", Wanted(device, migration, lenient), MigrationSettings())
        if notes is not None:
            notes += said
        return profile

    return run


def device_side(profile: Profile) -> Profile:
    """Return what of a profile is about the device."""
    return Profile(
        **{
            name: getattr(profile, name)
            for name in ("initial", "dirty", "stop_copy", "reads", "source_arcs", "features")
        }
    )


# --- what a migration is ------------------------------------------------------------------------------------


def test_a_migration_becomes_its_profile(imported: Import) -> None:
    """Every value that the trace has, each with its mark; none that it has not."""
    profile = imported(lines(move()))
    assert profile.initial.bytes == Value.measured(3 << 20)
    assert profile.dirty.kind == "curve"
    # Asked 40 ms and 60 ms after PRE_COPY: 5000, then 7000 more, the first ones read meanwhile.
    assert profile.dirty.curve == Value.measured(((0.0, 0), (0.04, 5000), (0.06, 12000)))
    assert profile.stop_copy.kind == "following"
    assert profile.stop_copy.extra_bytes == Value.measured(1000)
    assert profile.stop_copy.carried_bytes is None
    assert profile.reads.buffer_bytes == Value.measured(1 << 20)
    assert profile.reads.initial.bytes == Value.measured(Distribution(((1 << 20, 3),)))
    assert profile.reads.initial.seconds == Value.bounded(at_most=Distribution(((0.01, 2),)))
    assert profile.reads.initial.first_seconds == Value.bounded(at_most=0.01)
    assert profile.reads.dirty.bytes == Value.measured(Distribution(((5000, 1), (7000, 1))))
    assert profile.reads.stop_copy.bytes == Value.measured(Distribution(((1000, 1),)))
    arcs = ["RUNNING->PRE_COPY", "PRE_COPY->PRE_COPY_P2P", "PRE_COPY_P2P->STOP_COPY", "STOP_COPY->STOP"]
    assert dict(profile.source_arcs) == dict.fromkeys(arcs, Value.measured(Distribution.always(0.002)))
    assert profile.recorded.stop_seconds == pytest.approx(0.014)
    for missing in (
        profile.writes.initial.bytes,
        profile.loading.initial_seconds,
        profile.content.compressibility,
    ):
        assert missing is None
    assert profile.destination_arcs == {}
    assert profile.contention.resource is None
    assert DEVICE not in profile_text(profile)


@given(
    blocks=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=50),
    dirty=st.lists(st.integers(1, 1 << 40), min_size=1, max_size=50),
    extra=st.integers(1, 1 << 40),
)
def test_whatever_is_read_is_in_the_sums(blocks: list[int], dirty: list[int], extra: int) -> None:
    """Of any migration: bytes read, by phase, and bytes that became dirty; in both formats of a trace."""
    found = []
    for trace in (lines, simple):
        made = trace(move(initial=sum(blocks), blocks=tuple(blocks), dirty=tuple(dirty), extra=extra))
        with tempfile.NamedTemporaryFile() as file:
            file.write(made.encode() if isinstance(made, str) else made)
            file.flush()
            found.append(import_profile([Path(file.name)], "it", Wanted(), MigrationSettings())[0])
    assert device_side(found[0]) == device_side(found[1])
    profile = found[0]
    totals = [one.total for one in spreads(profile)]
    counts = [one.count for one in spreads(profile)]
    assert counts == [len(blocks), len(dirty), 1]
    # A spread of more than 32 values is grouped, each group by its mean in whole bytes.
    assert totals == pytest.approx([sum(blocks), sum(dirty), extra], abs=len(blocks) + len(dirty))
    assert profile.recorded.precopy_bytes == sum(blocks) + sum(dirty)
    assert profile.recorded.stop_copy_bytes == extra
    assert profile.dirty.curve is not None
    assert profile.dirty.curve.value[-1][1] == sum(dirty)


def test_what_a_field_can_hold_is_in_the_profile_and_more_is_refused(imported: Import) -> None:
    """A device may say anything; a trace with times that no machine has is not from one."""
    huge = (1 << 64) - 1
    events = (
        (at, name, (*fields[:2], huge, *fields[3:]) if name == "vfio_state_pending_exact" else fields)
        for at, name, fields in move()
    )
    assert imported(lines(events)).stop_copy.bytes == Value.measured(huge)
    late = ((at if at < 100.03 else at + 2e7, name, fields) for at, name, fields in move())
    with pytest.raises(ConfigError, match=r"the profile of this trace:.* expected"):
        imported(lines(late))


def test_an_estimate_of_0_and_an_exact_size_of_21_gb(imported: Import) -> None:
    """Peter Xu's case of 2024: whatever is read, the exact size stays what it is."""
    events = list(move(initial=0, blocks=(), dirty=(0, 0, 0), extra=21_038_628_864))
    events = [
        (at, name, fields) for at, name, fields in events if (name, fields) != ("vfio_save_block", (0,))
    ]
    profile = imported(lines(iter(events)))
    assert profile.dirty.kind == "none"
    assert profile.stop_copy.kind == "constant"
    assert profile.stop_copy.bytes == Value.measured(21_038_628_864)
    assert "21038628864" in profile_text(profile)


def test_data_that_is_not_what_the_length_said_is_its_own_value(imported: Import) -> None:
    events = (
        (at, name, (*fields[:2], 9000, *fields[3:]) if name == "vfio_state_pending_exact" else fields)
        for at, name, fields in move(carried=123_456)
    )
    profile = imported(lines(events))
    assert profile.stop_copy.bytes == Value.measured(9000)
    assert profile.stop_copy.carried_bytes == Value.measured(123_456)


def test_a_device_without_precopy(imported: Import) -> None:
    """SETUP comes first, and STOP_COPY from STOP."""
    text = "\n".join(
        [
            f"1@10.0:vfio_save_setup  ({DEVICE}) data buffer size 1048576",
            f"1@11.0:vfio_migration_set_state  ({DEVICE}) new state STOP, recover state ERROR",
            f"1@11.5:vfio_migration_set_device_state  ({DEVICE}) state STOP",
            f"1@12.0:vfio_save_complete_precopy_start  ({DEVICE})",
            f"1@12.0:vfio_migration_set_state  ({DEVICE}) new state STOP_COPY, recover state STOP",
            f"1@13.0:vfio_migration_set_device_state  ({DEVICE}) state STOP_COPY",
            f"1@13.5:vfio_save_block  ({DEVICE}) data_size 777",
            f"1@13.5:vfio_save_complete_precopy  ({DEVICE}) ret 0",
            f"1@14.0:vfio_save_cleanup  ({DEVICE})",
            "",
        ]
    )
    profile = imported(text)
    assert profile.features.pre_copy == Value.measured(False)
    assert profile.features.p2p == Value.measured(False)
    assert profile.stop_copy.carried_bytes == Value.measured(777)
    assert profile.source_arcs["STOP->STOP_COPY"] == Value.measured(Distribution.always(1.0))
    assert profile.dirty.kind is None


def test_a_size_of_100_gib_in_10_0_is_taken_for_qemus_own(imported: Import) -> None:
    events = (
        (at, name, (*fields[:2], 100 << 30, *fields[3:]) if name == "vfio_state_pending_exact" else fields)
        for at, name, fields in move()
    )
    profile = imported(lines(events))
    assert profile.features.data_size == Value.assumed(False)
    assert profile.stop_copy.kind is None


# --- forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["11.1", "none", "8.2"])
def test_every_form_of_a_log_says_the_same(imported: Import, form: str) -> None:
    """Without timestamps no times; before 9.1 a change of state is known by its end alone."""
    first, second = imported(lines(move())), imported(lines(move(), form=form))
    sizes = [
        found
        for found in differences(device_side(first), device_side(second), Tolerance(time_least=0.011))
        if "seconds" not in found.key
    ]
    if form == "none":
        assert second.recorded.timestamps is False
        assert {found.key for found in sizes} >= {"dirty.curve", "arcs.source.RUNNING->PRE_COPY"}
        assert not [key for key in profile_text(second).splitlines() if "seconds =" in key]
        assert second.reads.initial.bytes == first.reads.initial.bytes
    elif form == "8.2":
        assert {found.key for found in sizes} == {"arcs.source.RUNNING->PRE_COPY"}
        assert {value.mark for value in second.source_arcs.values()} == {Mark.BOUNDED}
    else:
        assert sizes == []


def test_a_simple_trace_says_the_same_as_the_log(imported: Import) -> None:
    log, binary = imported(lines(move())), imported(simple(move()))
    assert device_side(binary) == device_side(log)
    assert binary.recorded.format == "simple"


@pytest.mark.parametrize("release", RELEASES[1:])
def test_lines_of_others_make_no_difference(imported: Import, release: str) -> None:
    """Other subsystems, a log daemon's prefix, lines without end, empty ones, broken UTF-8, CR at the end."""
    text = recorded(release, "source")
    plain = imported(text, device="1")
    junk = [
        b"2026-11-26T22:33:42.214393Z migration_bitmap_sync_start \n",
        b"vfio_region_read  (a0.sock.vfio:region0+0x10, 4) = 0x0\n",
        b"12386@1795731149.686169:vfio_pci_hot_reset  (x) one\n",
        b"\xff\xfe\x00 vfio_save_block \n",
        b"x" * 200_000 + b" vfio_save_block  (a0.sock.vfio) data_size 5\n",
        b"qemu-system-x86_64: warning: vfio_something happened\n",
        b"\n",
    ]
    mixed = b"".join(
        junk[number % len(junk)] * (number % 50 == 0) + b"Nov 26 host qemu[1]: " * (number % 3 == 0) + line
        for number, line in enumerate(text.encode().splitlines(keepends=True))
    )
    assert imported(mixed, device="1") == plain
    assert imported(text.replace("\n", "\r\n"), device="1") == plain


def test_a_byte_order_mark_hides_no_event(imported: Import) -> None:
    text = lines(move())
    assert imported("\ufeff" + text) == imported(text)


def times_of(profile: Profile) -> dict[str, set[float]]:
    """Return the seconds of each kind of call and change of state."""
    found = {arc: value.value for arc, value in profile.source_arcs.items()}
    for phase in PHASES:
        calls = getattr(profile.reads, phase)
        found |= {phase: calls.seconds.value} if calls.seconds is not None else {}
        if calls.first_seconds is not None:
            found[f"{phase} first"] = Distribution.always(calls.first_seconds.value)
    return {name: {value for value, _ in spread.points} for name, spread in found.items()}


@pytest.mark.parametrize("seconds", [0.5, 3600.0])
def test_a_clock_that_is_set_back_makes_no_time(imported: Import, seconds: float) -> None:
    """Wherever it was: no time is shorter than it was, and none of a step is taken for 0 s."""
    events = later(move(), 5000.0)
    plain = imported(lines(iter(events)))
    spans = (plain.recorded.precopy_seconds, plain.recorded.stop_seconds)
    for step in range(2, len(events)):
        notes: list[str] = []
        back = later(events[step:], -seconds)
        profile = imported(lines(iter(events[:step] + back)), notes=notes)
        assert [note for note in notes if f"trace0:{step + 1}: " in note], step
        for name, found in times_of(profile).items():
            assert found <= times_of(plain)[name], (step, name)
        for found, whole in zip(
            (profile.recorded.precopy_seconds, profile.recorded.stop_seconds), spans, strict=True
        ):
            assert found in (None, whole), step
        assert profile.recorded.precopy_bytes == plain.recorded.precopy_bytes
        assert profile.recorded.stop_copy_bytes == plain.recorded.stop_copy_bytes


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gzip", "xz"])
def test_a_compressed_trace_is_read(imported: Import, pack: Callable[[bytes], bytes]) -> None:
    assert imported(pack(lines(move()).encode())) == imported(lines(move()))
    with pytest.raises(ConfigError, match="cannot be read or decompressed"):
        imported(pack(recorded("10.2", "source").encode())[:-2000], device="1")


# --- what was recorded here ---------------------------------------------------------------------------------


def blocks_of(text: str, device: str) -> list[list[int]]:
    """Return the bytes of each read of a device, by migration: an oracle of its own, by text alone."""
    found: list[list[int]] = []
    for line in text.splitlines():
        if f"({device})" not in line:
            continue
        if "vfio_migration_set_state" in line and "new state PRE_COPY, recover state RUNNING" in line:
            found.append([])
        elif block := re.search(r"vfio_save_block  .*data_size (\d+)", line):
            found[-1].append(int(block[1]))
    return found


@functools.cache
def of(release: str, sides: str, device: str, migration: int | None = None) -> tuple[Profile, list[str]]:
    """Import recorded traces of a release, once; `sides` in the order that they are given in."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for side in sides.split():
            paths.append(Path(folder) / side)
            paths[-1].write_text(recorded(release, side))
        return import_profile(paths, "it", Wanted(device, migration), MigrationSettings())


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("number", [1, 2])
def test_two_devices_and_two_migrations_are_kept_apart(release: str, number: int) -> None:
    text, name = recorded(release, "source"), f"a{number - 1}.sock.vfio"
    both, _ = of(release, "source", str(number))
    cancelled, completed = blocks_of(text, name)
    assert (both.recorded.migrations, both.recorded.completed) == (2, 1)
    total = (both.recorded.precopy_bytes or 0) + (both.recorded.stop_copy_bytes or 0)
    assert total == sum(completed)
    assert sum(one.count for one in spreads(both)) == len(cancelled) + len(completed)
    assert both.source_arcs["RUNNING->PRE_COPY"].value.count == 2
    assert both.source_arcs["PRE_COPY->RUNNING"].value.count == 1
    second, _ = of(release, "source", name, 2)
    assert sum(one.total for one in spreads(second)) == sum(completed)
    assert second.initial == both.initial


def spreads(profile: Profile) -> list[Distribution]:
    """Return the bytes of reads, by phase."""
    reads = profile.reads
    return [one.bytes.value for one in (reads.initial, reads.dirty, reads.stop_copy) if one.bytes]


def test_it_has_to_be_clear_which_device_and_migration(imported: Import) -> None:
    text = recorded("10.2", "source")
    with pytest.raises(ConfigError, match=r"has 2 devices \(1 a0.sock.vfio, 2 a1.sock.vfio\).*--device"):
        imported(text)
    with pytest.raises(ConfigError, match="has no device 3"):
        imported(text, device="3")
    with pytest.raises(ConfigError, match="migration 3: there are 2"):
        imported(text, device="1", migration=3)


@pytest.mark.parametrize("release", RELEASES)
def test_both_sides_in_any_order_are_one_profile(release: str) -> None:
    """The destination's phases come from the source's sizes; alone it has neither."""
    both, _ = of(release, "source destination", "1")
    assert both.destination_arcs.keys() >= {"RUNNING->RESUMING", "RESUMING->RUNNING_P2P"}
    assert both.initial == of(release, "source", "1")[0].initial
    alone, notes = of(release, "destination", "1")
    assert alone.initial.bytes is None
    assert any("only the destination" in note for note in notes)


def test_which_trace_comes_first_is_no_matter(imported: Import) -> None:
    source, destination = recorded("11.1", "source"), recorded("11.1", "destination")
    assert imported(destination, source, device="1") == of("11.1", "source destination", "1")[0]
    with pytest.raises(ConfigError, match="is a source, and so is a trace before it"):
        imported(source, source, device="1")


def test_what_goes_through_multifd_is_not_made_up() -> None:
    """No event has the bytes of STOP_COPY; how long the destination took for each buffer is bounded."""
    profile, _ = of("11.1-multifd", "source destination", "1")
    assert (profile.recorded.migrations, profile.recorded.completed) == (1, 1)
    assert profile.recorded.stop_copy_bytes is None
    assert profile.stop_copy.carried_bytes is None
    assert profile.reads.stop_copy.bytes is None
    assert profile.reads.initial.bytes is not None
    assert profile.writes.stop_copy.bytes is None
    assert profile.writes.stop_copy.seconds is not None
    assert profile.writes.stop_copy.seconds.mark is Mark.BOUNDED


def test_initial_data_that_appears_again_is_in_it(imported: Import) -> None:
    """11.1 tells of REINIT: between two answers, by how much at least and at most."""
    (event,) = imported(recorded("11.1", "source"), device="1", migration=1).reinits
    assert event.bytes is not None
    assert event.seconds is not None
    assert (event.bytes.lowest or event.bytes.value) >= 16 * 4096
    assert event.seconds.lowest is not None
    assert event.seconds.highest is not None
    assert 0 < event.seconds.lowest < event.seconds.highest
    assert imported(recorded("11.1", "source"), device="2").reinits == ()


# --- pieces -------------------------------------------------------------------------------------------------


def test_a_trace_may_end_anywhere(imported: Import) -> None:
    """What is left is a profile that says so, or no migration; sizes are never made up."""
    text = lines(move())
    whole = imported(text)
    total = whole.recorded.precopy_bytes
    ends = [match.end() for match in re.finditer("\n", text)][:-1]
    made, refused = 0, set()
    for end in chain(ends, (end - 5 for end in ends)):
        try:
            part = imported(text[:end])
        except ConfigError as error:
            refused.add(re.search("has no event|has no migration|$", str(error))[0])  # type: ignore[index]
            continue
        made += 1
        assert part.recorded.cut_off is True
        assert (part.recorded.precopy_bytes or 0) <= (total or 0)
        assert part.initial.bytes in (None, whole.initial.bytes)
        assert part.stop_copy.carried_bytes is None
    assert made > len(ends)
    assert refused == {"has no event"}


def test_a_simple_trace_may_end_anywhere(imported: Import) -> None:
    data = simple(move())
    # Behind the event by which QEMU asks for PRE_COPY there is a migration.
    begin = data.index(b"PRE_COPY") + 30
    for end in range(begin, len(data) - 1, 37):
        assert imported(data[:end]).recorded.cut_off is True
    with pytest.raises(ConfigError, match="has no event"):
        imported(data[: len(HEADER) + 5])


def test_a_trace_that_begins_in_the_middle_says_so(imported: Import) -> None:
    """No change of state is made up of a state that was not seen."""
    text = lines(move())
    notes: list[str] = []
    part = imported(text[text.index("PRE_COPY_P2P") - 60 :].split("\n", 1)[1], notes=notes)
    assert part.initial.bytes is None
    assert part.recorded.cut_off is True
    assert "RUNNING->PRE_COPY_P2P" not in part.source_arcs
    assert any("begins in the middle" in note for note in notes)


# --- harm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (
            "data_size 5000",
            "data_size 99999999999999999999999",
            ":\\d+: vfio_save_block: data_size 9+: has more",
        ),
        ("data_size 5000", "data_size many", ":\\d+: vfio_save_block 'data_size many': expected"),
        ("new state PRE_COPY_P2P", "new state SLEEPING", ":\\d+: state 'SLEEPING': expected one of"),
        ("precopy initial size 2097152", "precopy initial size -1", ":\\d+: vfio_save_iterate '"),
    ],
)
def test_an_error_names_line_and_field(imported: Import, was: str, now: str, said: str) -> None:
    text = lines(move())
    assert was in text
    with pytest.raises(ConfigError, match=f"trace0{said}"):
        imported(text.replace(was, now))
    notes: list[str] = []
    imported(text.replace(was, now), lenient=True, notes=notes)
    assert any("left out; the first: " in note for note in notes)


def test_events_that_qemu_dropped_are_an_error(imported: Import) -> None:
    """Of the simple backend, whose buffer may be full: what is summed up would be wrong."""
    import struct

    data = simple(move())
    dropped = struct.pack("<QQQIIQ", 1, (1 << 64) - 2, 10, 32, 1, 12)
    with pytest.raises(ConfigError, match=f"byte {len(data)}: QEMU dropped 12 events"):
        imported(data + dropped)
    imported(data + dropped, lenient=True)


@pytest.mark.parametrize(
    "trace", ["", "nothing of it\n", "vfio_region_read  (x:region0+0x0, 4) = 0x0\n", HEADER.decode("latin-1")]
)
def test_what_is_no_trace_is_refused(imported: Import, trace: str) -> None:
    with pytest.raises(ConfigError, match="no event of QEMU's VFIO migration code"):
        imported(trace.encode("latin-1"))


def test_a_big_endian_machines_trace_is_called_that(imported: Import) -> None:
    with pytest.raises(ConfigError, match="big-endian"):
        imported(struct.pack(">QQQ", *struct.unpack("<QQQ", HEADER)) + b"\0" * 100)


@pytest.mark.parametrize("source_first", [True, False])
def test_two_qemus_with_one_device_name_in_a_log_are_refused(imported: Import, source_first: bool) -> None:
    """What one of them does next would be taken for a change of state of the other."""
    sides = [recorded("10.2", "source").replace("a0.sock", "x"), recorded("10.2", "destination")]
    logs = [
        re.sub(
            r"\([\w.]+\.vfio\)", "(x.vfio)", "".join(line for line in log.splitlines(True) if device in line)
        )
        for log, device in zip(sides, ("(x.vfio)", "(b0.sock.vfio)"), strict=True)
    ]
    if not source_first:
        logs.reverse()
    for log in logs:
        imported(log)
    mixed = sorted("".join(logs).splitlines(keepends=True), key=lambda line: line.split()[0])
    with pytest.raises(ConfigError, match=r"trace0:\d+: 'x.vfio' sends and receives at once: two QEMUs"):
        imported("".join(mixed))


ARRIVING: list[Event] = [
    (90.0, "vfio_migration_set_state", ("RESUMING", "RUNNING")),
    (90.003, "vfio_migration_set_device_state", ("RESUMING",)),
]


def later(events: Iterable[Event], seconds: float) -> list[Event]:
    """Return events at later times."""
    return [(at + seconds, name, fields) for at, name, fields in events]


def test_a_log_that_goes_on_with_the_next_qemu_keeps_the_sides_apart(imported: Import) -> None:
    """libvirt appends: the VM left, and later came back with a device of the same name."""
    away = lines(move(), form="11.1")
    back = lines(iter(later(ARRIVING, 3000.0)), form="11.1")
    for whole in (away, away[: away.index("vfio_save_complete_precopy_start")].rpartition("\n")[0] + "\n"):
        profile = imported(whole + back)
        assert profile.recorded.migrations == 1
        assert list(profile.destination_arcs) == ["RUNNING->RESUMING"]
        assert "RUNNING->PRE_COPY" in profile.source_arcs


@pytest.mark.parametrize("form", ["8.2", "10.0", "11.1"])
def test_a_log_that_goes_on_with_the_next_qemu_has_no_arc_from_one_to_the_other(
    imported: Import, form: str
) -> None:
    """The first left, was ended while it migrated, or was ended while it received; the next one leaves."""
    first, ended = list(move()), list(move())
    del ended[next(at for at, event in enumerate(ended) if event[1] == "vfio_save_complete_precopy_start") :]
    plain = imported(lines(iter(first), form=form))
    following = lines(iter(later(first, 1000.0)), form=form)
    for before in (first, ended, ARRIVING):
        notes: list[str] = []
        profile = imported(lines(iter(before), form=form) + following, notes=notes)
        assert list(profile.source_arcs) == list(plain.source_arcs)
        assert set(profile.destination_arcs) <= {"RUNNING->RESUMING"}
        assert profile.initial == plain.initial
        assert profile.recorded.migrations == 1 + (before is not ARRIVING)
        assert profile.recorded.completed == 1 + (before is first)
        assert profile.recorded.precopy_bytes == plain.recorded.precopy_bytes
        assert notes == []


@pytest.mark.parametrize("form", ["8.2", "10.0", "11.1"])
def test_a_cold_start_of_the_next_qemu_is_no_arc_of_the_one_before(imported: Import, form: str) -> None:
    """Its device begins in RUNNING; the VM starts by way of RUNNING_P2P, which nobody reached from STOP."""
    away = lines(move(), form=form)
    started: list[Event] = []
    for at, state in ((200.0, "RUNNING_P2P"), (200.1, "RUNNING")):
        started.append((at, "vfio_migration_set_state", (state, "ERROR")))
        started.append((at + 0.05, "vfio_migration_set_device_state", (state,)))
    born: list[Event] = [(199.0, "vfio_migration_realize", ())]
    assert imported(away + lines(iter(born + started), form=form)) == imported(away)
    # The same QEMU, whose VM runs on here after all.
    arcs = imported(away + lines(iter(started), form=form)).source_arcs
    assert {"STOP->RUNNING_P2P", "RUNNING_P2P->RUNNING"} <= set(arcs)
    # A QEMU that was ended while it migrated.
    cut = away[: away.index("vfio_save_block")].rpartition("\n")[0] + "\n"
    profile = imported(cut + lines(iter(born + started), form=form) + away)
    assert profile.source_arcs.keys() == imported(away).source_arcs.keys()
    assert (profile.recorded.migrations, profile.recorded.completed) == (2, 1)
    # A QEMU that was ended while it received: nothing is under way when the log ends.
    arriving = lines(iter(ARRIVING), form=form)
    assert imported(arriving).recorded.cut_off
    assert not imported(arriving + lines(iter(born + started), form=form)).recorded.cut_off


def test_ranges_of_another_device_are_none_of_one_without_a_log(imported: Import) -> None:
    """The event of DMA_LOGGING_START names no device; the one that announces no log has none."""
    started = (
        "2026-11-26T10:01:35.000000Z vfio_device_dirty_tracking_start nr_ranges 2 32:[0x0 - 0x1], "
        "64:[0x0 - 0x0], pci64:[0x0 - 0x0]\n"
    )
    for has_log, found in ((1, DmaLogging(Value.bounded(at_least=2))), (0, DmaLogging())):
        announced: Event = (90.0, "vfio_migration_init", (7, 0, has_log))
        profile = imported(started + lines(chain([announced], move()), form="11.1"))
        assert profile.features.dma_logging == Value.measured(bool(has_log))
        assert profile.dma_logging == found


def test_a_call_in_which_the_clock_is_set_back_has_no_time(imported: Import) -> None:
    """It takes 0.2 s, and by the clock, which another device's event shows to be set back, 0.05 s."""
    events = list(move())
    plain = imported(lines(iter(events)))
    for step in range(1, len(events)):
        back: Event = (events[step - 1][0] - 0.15, "vfio_migration_set_device_state", ("RUNNING",))
        text = lines(iter([back]), device="another") + lines(iter(later(events[step:], 0.05)))
        profile = imported(lines(iter(events[:step])) + text)
        for name, found in times_of(profile).items():
            assert found <= times_of(plain)[name], (step, name)
        assert profile.recorded.precopy_seconds in (None, plain.recorded.precopy_seconds), step
        assert profile.recorded.stop_seconds in (None, plain.recorded.stop_seconds), step


@pytest.mark.parametrize(
    ("phase", "begun", "ended"),
    [
        (
            "dirty",
            (100.0, "vfio_load_state", (0xFFFFFFFFEF100004,)),
            (100.3, "vfio_load_state_device_data", (4096, 0)),
        ),
        (
            "stop_copy",
            (100.0, "vfio_load_state_device_buffer_load_start", (7,)),
            (100.3, "vfio_load_state_device_buffer_load_end", (7,)),
        ),
    ],
    ids=["record", "multifd buffer"],
)
def test_a_write_in_which_the_clock_is_set_back_has_no_time(
    imported: Import, phase: str, begun: Event, ended: Event
) -> None:
    """Another device's event in the middle of the write shows that the clock was set back."""

    def seconds(*between: Event) -> Value[Distribution] | None:
        before, behind = lines(iter([*ARRIVING, begun])), lines(iter([ended]))
        profile = imported(before + lines(iter(between), device="another") + behind)
        calls: Calls = getattr(profile.writes, phase)
        return calls.seconds

    whole = seconds()
    assert whole is not None
    assert whole.value == Distribution.always(0.3)
    assert seconds((99.8, "vfio_migration_set_device_state", ("RUNNING",))) is None


def test_events_of_two_threads_in_another_order_than_their_times_make_no_time(imported: Import) -> None:
    """That is no clock that was set back, and nothing takes less than 0 s."""
    events, notes = list(move()), list[str]()
    events[1] = (events[0][0] - 0.05, *events[1][1:])
    assert "RUNNING->PRE_COPY" not in imported(lines(iter(events)), notes=notes).source_arcs
    assert not [note for note in notes if "clock" in note]


def test_a_device_without_pre_copy_leaves_after_a_qemu_that_was_ended_while_it_received(
    imported: Import,
) -> None:
    leaving = [event for event in move() if event[1] not in ("vfio_save_iterate_start", "vfio_save_iterate")]
    begin = next(at for at, event in enumerate(leaving) if event[2] == ("STOP_COPY", "ERROR"))
    text = lines(iter(ARRIVING)) + lines(iter([leaving[2], *leaving[begin:]]))
    assert imported(text).recorded.completed == 1


def test_a_clock_that_was_set_back_between_migrations_changes_nothing(imported: Import) -> None:
    notes: list[str] = []
    twice = imported(lines(move()) + lines(iter(later(move(), 500.0))))
    assert imported(lines(iter(later(move(), 500.0))) + lines(move()), notes=notes) == twice
    assert notes == []


def test_of_two_times_that_the_clock_was_set_back_the_first_is_noted(imported: Import) -> None:
    events, notes = list(move()), list[str]()
    imported(lines(iter([*events[:5], *later(events[5:9], -50.0), *later(events[9:], -90.0)])), notes=notes)
    (note,) = (one for one in notes if "clock" in one)
    assert "trace0:6: " in note


def test_a_clock_that_was_set_back_is_noted_once(imported: Import) -> None:
    notes: list[str] = []
    imported(lines(iter(later(ARRIVING, 50.0))) + lines(move()), notes=notes)
    assert [note.partition(" (")[0] for note in notes] == ["the clock was set back within a migration"]


def test_that_no_migration_completed_is_noted(imported: Import) -> None:
    begun = list(move())
    begun = begun[: next(at for at, event in enumerate(begun) if event[2] == ("PRE_COPY_P2P", "ERROR"))]
    back: list[Event] = [
        (150.0, "vfio_migration_set_state", ("RUNNING", "ERROR")),
        (150.002, "vfio_migration_set_device_state", ("RUNNING",)),
        (150.003, "vfio_save_cleanup", ()),
    ]
    notes: list[str] = []
    assert imported(lines(iter(begun + back)), notes=notes).recorded.completed == 0
    assert any("no migration completed" in note for note in notes)
    notes.clear()
    imported(lines(iter(begun + back)) + lines(move()), notes=notes)
    assert not any("no migration completed" in note for note in notes)


def test_more_devices_than_a_machine_has_are_refused(imported: Import) -> None:
    """Memory is bounded by that too."""
    text = "".join(f"vfio_save_cleanup  (device{number})\n" for number in range(MAX_DEVICES + 1))
    with pytest.raises(ConfigError, match=f"more than {MAX_DEVICES} devices"):
        imported(text)


@given(st.binary(max_size=300))
def test_any_bytes_are_events_or_errors(data: bytes) -> None:
    """Never anything else: of a log, and behind the header of a simple trace."""
    list(read_log(io.BytesIO(data), "x"))
    list(read_simple(io.BytesIO(HEADER + data), "x"))


@given(st.data())
def test_a_damaged_simple_trace_is_events_or_errors(data: st.DataObject) -> None:
    trace = bytearray(simple(move()))
    for _ in range(data.draw(st.integers(1, 5))):
        trace[data.draw(st.integers(0, len(trace) - 1))] = data.draw(st.integers(0, 255))
    list(read_simple(io.BytesIO(trace), "x"))


@given(
    st.text(max_size=80),
    st.sampled_from(["vfio_save_block", "vfio_migration_set_state", "savevm_section_start"]),
)
def test_any_line_is_split_or_not(text: str, name: str) -> None:
    for line in (
        text,
        f"{text}{name}{text}",
        f"4711@{text}:{name}  ({text}) {text}",
        f"{text}Z {name} {text}",
    ):
        split_line(line)


def test_no_pattern_can_look_at_a_text_twice() -> None:
    """What follows a conversion begins with a character that it does not take: there is one way to match."""
    classes = {"%lu": r"\d", "%u": r"\d", "%d": r"\d", "0x%lx": "[0-9a-f]", "%s": r"[^\s,]"}
    checked = 0
    for form in chain(EVENTS, *(event.earlier for event in EVENTS)):
        parts = re.split(r"(0x%lx|%lu|%u|%d|%s)", form.text)
        for number, part in enumerate(parts):
            if part in classes and parts[number + 1]:
                assert not re.match(classes[part], parts[number + 1]), form.text
                checked += 1
            elif part in classes:
                assert number == len(parts) - 2, form.text
    assert checked > 30


class _Endless(io.RawIOBase):
    """A log of `size` bytes that is made while it is read."""

    def __init__(self, size: int) -> None:
        self.left = size
        text = lines(move())
        begin = text.index("vfio_state_pending_exact")
        self.first = text[: text.rindex("\n", 0, begin) + 1].encode()
        # Most lines of a log are not about a device's migration.
        others = b"4711@200.000001:vfio_region_write  (it:region0+0x10, 0x1, 4)\n" + b"".join(
            b"4711@200.000001:migration_rate_limit_%d nothing of a device\n" % number for number in range(30)
        )
        self.middle = others.join(
            f"4711@{200 + number / 1000:.6f}:vfio_save_block  ({DEVICE}) data_size {4096 + number}\n"
            f"4711@{200 + number / 1000:.6f}:vfio_state_pending_exact  ({DEVICE}) precopy 9 postcopy 0 "
            f"stopcopy size {9000 + number} precopy initial size 0 precopy dirty size {number}\n".encode()
            for number in range(500)
        )
        self.pending = self.first

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self.pending:
            if self.left <= 0:
                return 0
            self.pending = self.middle
        part = self.pending[: len(buffer)]
        self.pending = self.pending[len(part) :]
        buffer[: len(part)] = part
        self.left -= len(part)
        return len(part)


def _peak_bytes(size: int) -> int:
    """Return how much memory the import of a log of that size takes at most."""
    from vfu_dev.profile.from_qemu import QemuReader

    reader = QemuReader()
    tracemalloc.start()
    try:
        for event in read_log(io.BufferedReader(_Endless(size)), "endless"):
            reader.tell(event)  # type: ignore[arg-type]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_trace() -> None:
    small, large = _peak_bytes(150_000), _peak_bytes(1_500_000)
    assert large < small + (256 << 10)


@pytest.mark.soak
def test_ten_gib_are_imported_in_little_memory(tmp_path: Path) -> None:
    """Through a pipe, which cannot be read twice; the profile is made, and the process stayed small."""
    import os
    import resource

    path = tmp_path / "trace.log"
    os.mkfifo(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def feed() -> None:
        source = _Endless(10 << 30)
        with open(path, "wb", 1 << 20) as sink:
            while data := source.read(1 << 20):
                sink.write(data)

    feeder = threading.Thread(target=feed)
    feeder.start()
    profile, _ = import_profile([path], "large", Wanted(), MigrationSettings())
    feeder.join()
    assert profile.recorded.cut_off is True
    assert profile.reads.dirty.bytes is not None
    assert profile.reads.dirty.bytes.value.count > 1_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
