"""The table of QEMU's events against every QEMU there is: names by `-trace help`, texts in the program."""

from __future__ import annotations

import fnmatch
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vfu_dev.builds.qemu_binary import QemuBinary, probe_qemu
from vfu_dev.builds.qemu_packages import PROGRAM, SUITES
from vfu_dev.qemu_events import EVENT_STATES, EVENTS, TRACE_PATTERNS

BUILT = ("patched", "unpatched")


@pytest.fixture(scope="module", params=[*BUILT, *(suite.name for suite in SUITES)])
def name(request: pytest.FixtureRequest) -> str:
    """Each QEMU in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def binary(name: str, qemu: Path, unpatched: Path, stock_qemu: Callable[[str], QemuBinary]) -> QemuBinary:
    """That QEMU."""
    return probe_qemu({"patched": qemu, "unpatched": unpatched}[name]) if name in BUILT else stock_qemu(name)


@pytest.fixture(scope="module")
def program(binary: QemuBinary) -> bytes:
    """Its program's bytes: Debian's are started by a script."""
    unpacked = binary.path.parent / "usr/bin" / PROGRAM
    return (unpacked if unpacked.exists() else binary.path).read_bytes()


@pytest.fixture(scope="module")
def names(binary: QemuBinary) -> set[str]:
    """The trace events that it lists."""
    command = [binary.path, "-trace", "help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_it_has_the_events_that_the_table_says_and_no_others(
    name: str, binary: QemuBinary, names: set[str]
) -> None:
    for event in EVENTS:
        expected = event.is_in(binary.release) or (event.ours and name == "patched")
        assert (event.name in names) == expected, event.name


def test_their_texts_are_those_of_the_table(binary: QemuBinary, names: set[str], program: bytes) -> None:
    """With the conversions of an x86-64 build, as its log backend prints them."""
    for event in EVENTS:
        if event.name in names:
            line = f"{event.name} {' (%s) ' * event.named}{event.text}".rstrip()
            assert f"{line}\n".encode() in program, event.name


def test_its_event_has_the_states_of_the_table(binary: QemuBinary, program: bytes) -> None:
    """Linkers keep a text that another one ends with once, so nothing is asked of what is before it."""
    for state, since in EVENT_STATES.items():
        assert (f"{state}\0".encode() in program) == (since <= binary.release), state


def test_no_event_of_the_table_is_left_out_of_what_the_lab_traces(names: set[str]) -> None:
    for event in EVENTS:
        assert event.lab == any(fnmatch.fnmatchcase(event.name, pattern) for pattern in TRACE_PATTERNS)
    for pattern in ("vfio_save_*", "vfio_load_*", "vfio_state_pending*", "vfio_migration_*"):
        assert fnmatch.filter(names, pattern), pattern
