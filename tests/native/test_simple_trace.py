"""A simple trace by QEMU's own code is read as the log of the same events.

trace/simple.c of the pinned tree is compiled, and what its tracetool generates from hw/vfio/trace-events: no
QEMU here is built with that backend.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS
from tracekit import DEVICE, lines, move

from vfu_dev.profile import Profile
from vfu_dev.profile.importing import Wanted, import_profile
from vfu_dev.profile.model import MigrationSettings
from vfu_dev.qemu_events import EVENTS
from vfu_dev.qemu_trace import Traced, read_simple

HARNESS = Path(__file__).with_name("simple_trace.c")
# What `configure` would have found.
CONFIG = """\
#define CONFIG_POSIX 1
#define CONFIG_LINUX 1
#define CONFIG_IOVEC 1
#define CONFIG_TRACE_SIMPLE 1
#define CONFIG_TRACE_FILE "trace"
"""
RELEASE = (10, 2)


def dispatcher() -> str:
    """Return C that calls the trace function of each event of the table that the pinned QEMU has."""
    found = []
    for event in EVENTS:
        if not event.is_in(RELEASE) or not event.name.startswith("vfio_"):
            continue
        kinds = [is_word for _, is_word in event.arguments]
        first = 3 if event.named else 2
        arguments = ["device"] if event.named else []
        arguments += [
            f"words[{at}]" if is_word else f"number({at})" for at, is_word in enumerate(kinds, first)
        ]
        found.append(
            f'if (!strcmp(name, "{event.name}")) {{ trace_{event.name}({", ".join(arguments)}); return; }}'
        )
    return "\n".join(found) + "\n"


@pytest.fixture(scope="module")
def simple_trace(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the harness."""
    folder = tmp_path_factory.mktemp("simple")
    (folder / "trace").mkdir()
    (folder / "config-host.h").write_text(CONFIG)
    (folder / "config-poison.h").touch()
    (folder / "dispatch.inc").write_text(dispatcher())
    tracetool = [sys.executable, tree / "scripts/tracetool.py", "--backend=simple", "--group=hw_vfio"]
    for form in ("h", "c"):
        made = folder / "trace" / f"trace-hw_vfio.{form}"
        events = tree / "hw/vfio/trace-events"
        subprocess.run([*tracetool, f"--format={form}", events, made], check=True, timeout=PATIENCE_SECONDS)
    ask = ["pkg-config", "--cflags", "--libs", "glib-2.0"]
    try:
        glib = shlex.split(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"glib's headers are missing (apt-get install libglib2.0-dev): {error}")
    program = folder / "simple-trace"
    sources = [HARNESS, folder / "trace/trace-hw_vfio.c", tree / "trace/simple.c"]
    includes = [f"-I{one}" for one in (folder, folder / "trace", tree / "include", tree)]
    command = ["cc", "-O0", "-w", "-D_GNU_SOURCE", *includes, *sources, "-o", program, *glib, "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def written(program: Path, folder: Path, events: list[tuple[float, str, tuple[int | str, ...]]]) -> Path:
    """Return a file with these events, of one device."""
    path = folder / "trace-4711"
    text = "".join(
        f"{round(at * 1e9)} {name} {DEVICE} {' '.join(str(field) for field in fields)}\n"
        for at, name, fields in events
    )
    subprocess.run([program, path], input=text, text=True, check=True, timeout=PATIENCE_SECONDS)
    return path


def test_a_migration_is_the_same_in_both_formats(simple_trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(lines(move()))
    binary = written(simple_trace, tmp_path, list(move()))

    def of(path: Path) -> Profile:
        return import_profile([path], "it", Wanted(), MigrationSettings())[0]

    simple = of(binary)
    assert simple.recorded.format == "simple"
    assert simple.recorded.completed == 1
    text = of(log)
    assert replace(simple, source=None, recorded=text.recorded) == replace(text, source=None)


def test_every_event_of_the_table_is_read_with_its_fields(simple_trace: Path, tmp_path: Path) -> None:
    """Numbers by their order, strings of any length; a negative result keeps its sign."""
    events, expected = [], {}
    for event in EVENTS:
        if event.is_in(RELEASE) and event.named and event.name.startswith("vfio_"):
            fields: list[int | str] = []
            for number, (name, is_word) in enumerate(event.arguments):
                fields.append("w" * (5 + number) if is_word else -5 if name == "ret" else 1000 + number)
            events.append((float(len(events) + 1), event.name, tuple(fields)))
            expected[event.kind, len(events)] = {
                name: value for (name, _), value in zip(event.arguments, fields, strict=True) if name
            }
    with written(simple_trace, tmp_path, events).open("rb") as file:
        found = list(read_simple(file, "simple"))
    assert len(found) == len(events) > 25
    for number, one in enumerate(found, 1):
        assert isinstance(one, Traced), one
        assert (one.time, one.device) == (float(number), DEVICE)
        assert {**one.numbers, **one.words} == expected[one.kind, number]
    assert re.fullmatch(r"simple: byte \d+", found[0].place)
