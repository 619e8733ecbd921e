"""What `vfu-dev profile record` wrote is read as what it says, and what is no such file is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_dev.errors import ConfigError
from vfu_dev.profile import Distribution, Profile, Value
from vfu_dev.profile.from_calls import CallReader, read_calls
from vfu_dev.profile.importing import Wanted, import_profile
from vfu_dev.profile.model import MigrationSettings
from vfu_dev.qemu_trace import TraceError

MS = 1_000_000
SOURCE = [
    (1, "flags = 0 7"),
    (1, "precopy-info-v2 = 0"),
    (2, "log-start 5 = -22"),
    (2, "log-start 3 = 0"),
    (3, "log-report 4096 = 0"),
    (1, "data-size = 0 70000"),
    (50, "set-state 6 = 0"),
    (1, "precopy-info = 0 65536 0 0"),
    (4, "read 1048576 = 65536"),
    (1, "read 1048576 = -42"),
    (1, "data-size = 0 5000"),
    (1, "precopy-info = 0 0 4000 0"),
    (1, "data-size = 0 6000"),
    (1, "precopy-info = 0 4096 904 1"),
    (4, "read 1048576 = 5000"),
    (7, "set-state 7 = 0"),
    (8, "set-state 3 = 0"),
    (20, "read 1048576 = 1000"),
    (5, "read 1048576 = 100"),
    (1, "read 1048576 = 0"),
    (9, "set-state 1 = 0"),
]
DESTINATION = [
    (1, "flags = 0 7"),
    (3, "set-state 4 = 0"),
    (2, "write 32768 = 32768"),
    (1480, "write 32768 = 32768"),
    (2, "write 5000 = 5000"),
    (2, "write 1100 = 1100"),
    (1500, "set-state 5 = 0"),
    (1, "set-state 2 = 0"),
]


def text_of(calls: list[tuple[int, str]], device: int = 0) -> str:
    """Return a file: each call takes its milliseconds, and 1 ms passes before it."""
    at, lines = 5 * MS, ["vfu-dev calls 1"]
    for milliseconds, call in calls:
        at += MS
        lines.append(f"{at} {at + milliseconds * MS} 77 {device} {call}")
        at += milliseconds * MS
    return "\n".join(lines) + "\n"


def imported(folder: Path, *texts: str) -> Profile:
    paths = []
    for number, text in enumerate(texts):
        paths.append(folder / f"calls{number}")
        paths[-1].write_text(text)
    return import_profile(paths, "it", Wanted(), MigrationSettings())[0]


def always(value: float) -> Value[Distribution]:
    return Value.measured(Distribution.always(value))


def test_every_time_is_measured(tmp_path: Path) -> None:
    profile = imported(tmp_path, text_of(SOURCE), text_of(DESTINATION))
    features = profile.features
    assert (features.pre_copy, features.p2p, features.precopy_info_v2) == (Value.measured(True),) * 3
    assert features.dma_logging == Value.measured(True)
    assert profile.initial.bytes == Value.measured(65536)
    assert profile.stop_copy.running_bytes == Value.measured(70000)
    assert profile.stop_copy.extra_bytes == Value.measured(1000)
    assert profile.reads.initial.first_seconds == Value.measured(0.004)
    assert profile.reads.stop_copy.first_seconds == Value.measured(0.020)
    assert profile.reads.stop_copy.seconds == always(0.005)
    assert dict(profile.source_arcs) == {
        "RUNNING->PRE_COPY": always(0.050),
        "PRE_COPY->PRE_COPY_P2P": always(0.007),
        "PRE_COPY_P2P->STOP_COPY": always(0.008),
        "STOP_COPY->STOP": always(0.009),
    }
    assert profile.destination_arcs["RESUMING->RUNNING_P2P"] == always(1.5)
    assert profile.loading.initial_seconds == Value.measured(1.48)
    assert profile.writes.stop_copy.bytes == always(1100)
    assert profile.dma_logging.max_ranges == Value.bounded(at_least=3, at_most=4)
    assert profile.dma_logging.report_seconds == always(0.003)
    (reinit,) = profile.reinits
    assert reinit.bytes == Value.measured(4096)
    assert (profile.recorded.completed, profile.recorded.cut_off) == (1, False)
    assert profile.recorded.stop_copy_bytes == 1100


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0)], ids=["flags asked again", "flags asked last"])
@pytest.mark.parametrize("calls", [SOURCE, [call for call in SOURCE if "904 1" not in call[1]]])
def test_a_device_that_tells_reinit_has_it(
    tmp_path: Path, order: tuple[int, ...], calls: list[tuple[int, str]]
) -> None:
    """In whichever order the client asked. Else the profile of a real trace contradicts itself."""
    profile = imported(tmp_path, text_of([*(calls[index] for index in order), *calls[2:]]))
    told = len(profile.reinits) == 1
    assert told is (calls is SOURCE)
    assert profile.features.precopy_info_v2 == Value.measured(True)


def test_a_device_that_refuses_precopy_info_v2_lacks_it(tmp_path: Path) -> None:
    calls = [(ms, call.replace("v2 = 0", "v2 = -25").replace("904 1", "904 0")) for ms, call in SOURCE]
    assert imported(tmp_path, text_of(calls)).features.precopy_info_v2 == Value.measured(False)


def test_a_call_that_failed_changes_nothing(tmp_path: Path) -> None:
    failed = [
        (9, call.replace("= 0", "= -5", 1)) if "set-state 7" in call else (ms, call) for ms, call in SOURCE
    ]
    profile = imported(tmp_path, text_of(failed))
    assert "PRE_COPY->PRE_COPY_P2P" not in profile.source_arcs
    assert profile.source_arcs["PRE_COPY->STOP_COPY"] == always(0.008)


def test_a_file_may_end_anywhere(tmp_path: Path) -> None:
    text = text_of(SOURCE)
    begin = text.index("precopy-info =")
    for end in range(begin, len(text) - 1, 13):
        assert imported(tmp_path, text[:end]).recorded.cut_off is True


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("calls 1", "calls 2", ":1: calls of another version"),
        ("read 1048576 = 65536", "read many = 65536", r":10: ASKED 'many': expected a number"),
        ("read 1048576 = 65536", "read = 65536", ":10: read: .* not as many numbers"),
        ("read 1048576 = 65536", "peek 1048576 = 65536", ":10: .*: no call of this version"),
        ("set-state 7", "set-state 8", ":17: set-state 8: there is no such state"),
        (" 77 0 flags", " 77 256 flags", ":2: DEVICE 256: more than 256 devices"),
        ("flags = 0 7", f"flags = 0 {'9' * 600}", ":2: a line that is too long"),
    ],
)
def test_an_error_names_line_and_field(tmp_path: Path, was: str, now: str, said: str) -> None:
    text = text_of(SOURCE)
    assert was in text
    with pytest.raises(ConfigError, match=f"calls0{said}"):
        imported(tmp_path, text.replace(was, now, 1))


@given(st.lists(st.one_of(st.sampled_from([line for _, line in SOURCE + DESTINATION]), st.text(max_size=30))))
def test_any_lines_are_calls_or_errors(calls: list[str]) -> None:
    reader = CallReader()
    for call in read_calls(io.BytesIO(text_of([(1, call) for call in calls]).encode()), "x"):
        if not isinstance(call, TraceError):
            try:
                reader.tell(call)
            except TraceError:
                continue


BUSY = [
    (50, "set-state 6 = 0"),
    (1, "precopy-info = 0 65536 0 0"),
    (4, "read 1048576 = 65536"),
    (1, "data-size = 0 5000"),
    (1, "precopy-info = 0 0 4100 0"),
    (1, "data-size = 0 9000"),
    (1, "precopy-info = 0 0 8050 0"),
    (1, "data-size = 0 12000"),
    (1, "precopy-info = 0 0 11300 0"),
]


def test_what_becomes_dirty_between_two_answers_is_within_the_bounds(tmp_path: Path) -> None:
    """A device whose length is what is left and 1000: each time, 50 to 300 bytes came between the answers.

    A question just before the length's makes the bound narrower: less can have come since then.
    """
    wide = imported(tmp_path, text_of(BUSY)).stop_copy
    assert (wide.kind, wide.extra_bytes) == ("following", Value.bounded(at_least=700, at_most=3950))
    asked = [*BUSY[:-2], (1, "precopy-info = 0 0 10950 0"), *BUSY[-2:]]
    narrow = imported(tmp_path, text_of(asked)).stop_copy
    assert narrow.extra_bytes == Value.bounded(at_least=700, at_most=1050)


def test_one_answer_is_no_measurement_where_data_became_dirty(tmp_path: Path) -> None:
    busy = imported(tmp_path, text_of(BUSY[:5])).stop_copy
    assert busy.extra_bytes == Value.bounded(at_least=900, at_most=5000)
    quiet = [*BUSY[:2], (1, "data-size = 0 66536"), BUSY[1]]
    assert imported(tmp_path, text_of(quiet)).stop_copy.extra_bytes == Value.measured(1000)
