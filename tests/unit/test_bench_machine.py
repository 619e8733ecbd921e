"""Who runs where while `vfu-dev bench` measures, what keeps processors awake, and memory that is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS, runs, wait_until

from vfu_dev.bench import machine
from vfu_dev.bench.machine import awake, busy_core, keep_server, touch_memory
from vfu_dev.bench.peers import Bench, bench
from vfu_dev.bench.raw import RawClient
from vfu_dev.bench.start import bytecode_kept
from vfu_dev.builds import BuildError

ALLOWED = sorted(os.sched_getaffinity(0))
MIB = 1 << 20


def fields(pid: int) -> list[str]:
    """Return proc(5), /proc/PID/stat from field 3, the state, on; [] if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def processor_seconds(pid: int) -> float:
    utime, stime = fields(pid)[11:13]
    return (int(utime) + int(stime)) / os.sysconf("SC_CLK_TCK")


def spinners(parent: int, policy: int) -> dict[int, int]:
    """Return processor -> process id, of the children of `parent` of class `policy` that have one only."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or not (stat := fields(pid := int(entry.name))) or int(stat[1]) != parent:
            continue
        cpus = os.sched_getaffinity(pid)
        if len(cpus) == 1 and os.sched_getscheduler(pid) == policy:
            found[cpus.pop()] = pid
    return found


def spinners_of_awake(parent: int) -> dict[int, int]:
    """Wait until `parent` has a spinner of the class SCHED_IDLE on each processor; return them."""

    def all_there() -> dict[int, int]:
        found = spinners(parent, os.SCHED_IDLE)
        return found if sorted(found) == ALLOWED else {}

    there: dict[int, int] = wait_until(all_there, "a process of the class SCHED_IDLE on each processor")
    return there


# --- client and server ------------------------------------------------------------------------------------


def processors(pid: int) -> set[int]:
    """Return the processors of the process `pid`, which are those of each of its threads."""
    threads = [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    (found,) = {frozenset(os.sched_getaffinity(thread)) for thread in threads}
    return set(found)


@pytest.fixture
def servers() -> Iterator[Bench]:
    try:
        with bench() as one:
            yield one
    except BuildError as error:
        pytest.skip(str(error))


def test_client_and_server_have_a_processor_each(servers: Bench) -> None:
    """Our server and the peer are on one, the client of each on another."""
    ours, peer = servers.ours(1), servers.reference(1)
    with RawClient(ours.socket) as mine, RawClient(peer.socket) as theirs:
        client = processors(mine._process.pid)
        assert client == processors(theirs._process.pid)
        server = processors(ours.process.pid)
        assert server == processors(peer.process.pid)
    assert (len(client), len(server)) == (1, 1)
    assert len(client | server) == min(2, len(ALLOWED))


def test_a_server_is_kept_with_all_its_threads() -> None:
    program = (
        "import sys, threading\nthreading.Thread(target=sys.stdin.read).start()\nprint('two', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "two\n"
        assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) >= 2
        keep_server(server.pid)
        assert len(processors(server.pid)) == 1
        server.communicate("")


@pytest.mark.parametrize(
    ("cores", "chosen"),
    [
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, (0, 2)),
        ({0: "0", 1: "1"}, (0, 1)),
        ({4: "4-5", 5: "4-5"}, (4, 5)),
        ({3: "3"}, (3, 3)),
    ],
)
def test_the_two_are_on_different_cores_if_there_are_two(
    monkeypatch: pytest.MonkeyPatch, cores: dict[int, str], chosen: tuple[int, int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    monkeypatch.setattr(machine, "_core", cores.__getitem__)
    assert machine._processors() == chosen


# --- processors that do not become idle -------------------------------------------------------------------


def test_awake_has_a_process_of_the_least_class_on_each_processor_and_leaves_none() -> None:
    with awake():
        there = spinners_of_awake(os.getpid())
        assert all(runs(pid) for pid in there.values())
    assert not any(runs(pid) for pid in there.values())
    assert spinners(os.getpid(), os.SCHED_IDLE) == {}


def test_what_keeps_processors_awake_gives_way_to_another_session() -> None:
    """As a server has one: of a processor that both want it gets nearly all, which is no matter of speed."""
    cpu = ALLOWED[-1]
    program = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    with awake():
        idle = spinners_of_awake(os.getpid())[cpu]
        with subprocess.Popen([sys.executable, "-ISc", program], start_new_session=True) as server:
            try:
                wait_until(lambda: processor_seconds(server.pid) > 0.1, "the server works")
                began, idle_began = processor_seconds(server.pid), processor_seconds(idle)
                wait_until(lambda: processor_seconds(server.pid) - began >= 1.0, "a second of work")
                assert processor_seconds(idle) - idle_began < 0.1
            finally:
                server.kill()


WAITING = """
import signal, sys
from vfu_dev.bench.machine import awake
try:
    with awake():
        print("awake", flush=True)
        signal.pause()
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_what_keeps_processors_awake_ends_with_the_command(end: signal.Signals) -> None:
    """By Ctrl-C, which a terminal sends to the command's session only; and by a kill of the command."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        try:
            assert command.stdout is not None
            assert command.stdout.readline() == "awake\n"
            there = spinners_of_awake(command.pid)
            assert all(os.getsid(pid) == pid for pid in there.values()), (
                "Ctrl-C reaches them, and they say so"
            )
            os.killpg(command.pid, end)
            assert command.communicate(timeout=PATIENCE_SECONDS) == ("", "")
        finally:
            command.kill()
    assert command.returncode == (0 if end is signal.SIGINT else -end)
    wait_until(lambda: not any(runs(pid) for pid in there.values()), "they end")


def test_a_busy_core_is_for_its_process_alone() -> None:
    """The rest has the others, and all of them afterwards; on one processor there are no others."""
    with busy_core(True):
        busy = ALLOWED[-1]
        pid = wait_until(
            lambda: spinners(os.getpid(), os.SCHED_OTHER).get(busy), "one processor is kept busy"
        )
        assert sorted(os.sched_getaffinity(0)) == (ALLOWED[:-1] or ALLOWED)
    assert sorted(os.sched_getaffinity(0)) == ALLOWED
    assert not runs(pid)


# --- memory -----------------------------------------------------------------------------------------------


def kib(name: str) -> int:
    """Return a line of proc(5), /proc/PID/status, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_touched_memory_was_there_and_is_given_back() -> None:
    size = 64 * MIB
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kib("VmRSS")
    assert touch_memory(size) == size
    tolerance = 8 << 10  # the kernel counts pages in batches, and the interpreter has its own
    assert kib("VmHWM") - before >= (size >> 10) - tolerance
    assert kib("VmRSS") - before <= tolerance


def test_half_of_the_available_memory_is_touched_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_available_bytes", lambda: 8 * MIB)
    assert touch_memory(64 * MIB) == 4 * MIB


def test_children_keep_compiled_modules_where_that_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a child compiles is kept in the folder; nothing is left beside the module or in os.environ."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_module.py").write_text("")
    before = dict(os.environ)
    with bytecode_kept():
        subprocess.run([sys.executable, "-c", "import some_module"], check=True)
        kept = [path.name for path in Path(os.environ["PYTHONPYCACHEPREFIX"]).rglob("some_module*.pyc")]
    assert len(kept) == 1
    assert dict(os.environ) == before
    assert [path.name for path in tmp_path.rglob("*")] == ["some_module.py"]
