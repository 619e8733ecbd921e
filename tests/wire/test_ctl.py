"""`vfu-dev ctl` and the control socket of a real server, which nothing that is sent there may end."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serverkit import PATIENCE_SECONDS, RunningServer, ServerFactory, run_vfu_dev, wait_until

from vfu_dev.cli import main
from vfu_dev.client.control import ControlError
from vfu_dev.uapi import DeviceState

DOCUMENT = (Path(__file__).parents[2] / "docs" / "control.md").read_text()


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def ctl(server: RunningServer, *arguments: object) -> Done:
    """Run `vfu-dev ctl` on the server, in this process: starting Python takes longer than the command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(["ctl", str(server.control_path), *map(str, arguments)])
    return Done(int(left.value.code or 0), out.getvalue(), err.getvalue())


def answer(server: RunningServer, *arguments: object) -> Any:
    """Run `vfu-dev ctl ... --json`, which has to succeed, and return what it prints."""
    done = ctl(server, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def lasting(serve_module: ServerFactory) -> RunningServer:
    """One server for everything that must not hurt it."""
    return serve_module("--fill", "3")


@pytest.fixture(scope="module")
def serve_module(library: Path) -> Iterator[ServerFactory]:
    from serverkit import server_farm, short_folder

    with short_folder() as folder, server_farm(library, folder) as start:
        yield start


# --- the command line ---------------------------------------------------------------------------------------


def test_status_as_text_and_as_json(lasting: RunningServer) -> None:
    """The same, for people and for programs."""
    text, values = ctl(lasting, "status").stdout, answer(lasting, "status")
    assert "state: RUNNING" in text.splitlines()
    assert values["state"] == "RUNNING"
    assert values["memories"][0]["size_bytes"] == 1 << 20
    assert stat.S_IMODE(lasting.control_path.stat().st_mode) == 0o600


def test_a_load_is_set_watched_and_ended(lasting: RunningServer) -> None:
    """What the options say is what the device does; a replaced or ended load is told from a running one."""
    set_ = answer(
        lasting, "load", "--pattern", "hotset", "--dirty-rate", "2000p", "--hot-share", "0.5", "--seed", 4
    )
    assert set_["running"]
    assert set_["load"] == {
        "pattern": "hotset",
        "seed": 4,
        "rate_pages": 2000,
        "write_bytes": 8,
        "hot_fraction": 0.1,
        "hot_share": 0.5,
    }
    wait_until(lambda: answer(lasting, "load-status")["writes"] > 100, "the device writes")
    answer(lasting, "load", "--write-rate", "1M", "--write-size", "4K", "--burst", "0.5:0.1")
    assert answer(lasting, "status")["load"]["load"]["burst"] == {"duty": 0.5, "period_seconds": 0.1}
    ended = answer(lasting, "load", "--off")
    assert not ended["running"]
    writes = answer(lasting, "load-status")["writes"]
    assert writes == ended["writes"]


def test_a_load_ends_by_itself(lasting: RunningServer) -> None:
    """Nobody has to be there."""
    answer(lasting, "load", "--dirty-rate", "500p", "--duration", 0.2)
    wait_until(lambda: not answer(lasting, "load-status")["running"], "the load is over")
    assert answer(lasting, "load-status")["seconds"] >= 0.2


def test_digests_and_checksums_belong_together(lasting: RunningServer) -> None:
    """A write changes the digest, and the snapshot says where; reading changes nothing."""
    first, snapshot = answer(lasting, "digest"), answer(lasting, "checksums")
    assert first["stable"]
    assert snapshot["stable"]
    assert snapshot["digest"] == first["digest"]
    assert snapshot["registers"]["registers"]["id"] == "0x44554656"
    with lasting.connect() as device:
        device.region_write(2, 8192, b"something else")
        second = answer(lasting, "checksums")
    assert second["memories"][0]["digest"] != snapshot["memories"][0]["digest"]
    assert second["blocks"] == snapshot["blocks"]
    assert second["digest"] != snapshot["digest"]


def test_checksums_by_their_older_name(lasting: RunningServer) -> None:
    """`ctl snapshot` still answers, and no help mentions it."""
    older, now = answer(lasting, "snapshot"), answer(lasting, "checksums")
    assert older["digest"] == now["digest"]
    shown = run_vfu_dev("ctl", "--help").stdout
    assert "checksums" in shown
    assert "snapshot" not in shown


def test_a_device_at_work_is_not_stable(lasting: RunningServer) -> None:
    """What changes by itself has no digest that lasts."""
    answer(lasting, "load", "--dirty-rate", "1000p")
    assert not answer(lasting, "digest")["stable"]
    answer(lasting, "load", "--off")
    assert answer(lasting, "digest")["stable"]


def test_reinit_makes_data_initial_again(lasting: RunningServer) -> None:
    """In PRE_COPY a client that opted in sees initial_bytes rise; before it nothing was left."""
    with lasting.connect() as device:
        migration = device.migration
        migration.enable_precopy_info_v2()
        migration.set_state(DeviceState.PRE_COPY)
        buffer = memoryview(bytearray(1 << 20))
        while migration.precopy_info().initial_bytes:
            migration.finish_read(migration.submit_read(buffer))
        assert answer(lasting, "reinit", "--pages", 10) == {
            "memory": "memory",
            "pages": 10,
            "state": "PRE_COPY",
            "version": 2,
        }
        info = migration.precopy_info()
        assert info.reinit
        assert info.initial_bytes > 10 * 4096
        migration.set_state(DeviceState.STOP)
        refused = ctl(lasting, "reinit")
        assert refused.returncode == 1
        assert "in STOP the device does not change" in refused.stderr
        migration.set_state(DeviceState.RUNNING)


def test_log_level_fault_and_quit(serve: ServerFactory) -> None:
    """The rest of the commands do what they say."""
    server = serve()
    assert answer(server, "log-level", "debug") == {"level": "DEBUG", "version": 2}
    armed = answer(server, "fault", "op=region-read,error=EIO,count=1")
    assert answer(server, "faults")["armed"][0]["id"] == armed["id"]
    assert answer(server, "fault", "--clear", armed["id"]) == {"cleared": 1, "version": 2}
    assert answer(server, "send", '{"command": "status"}')["pid"] == server.process.pid
    # As a user runs it, once.
    done = run_vfu_dev("ctl", server.control_path, "quit")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert server.process.wait(PATIENCE_SECONDS) == 0
    assert not server.control_path.exists()
    gone = ctl(server, "status")
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1
    assert "is `vfu-dev serve` running" in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["load", "--write-rate", "1M", "--memory-name", "vram"], "expected one of memory"),
        (["load", "--trace", "/nowhere.csv"], "/nowhere.csv"),
        (["reinit", "--pages", "0"], "pages 0: expected a number from 1 to 256"),
        (["reinit", "--memory-name", "x"], "expected one of memory"),
        (["fault", "op=nothing"], "op"),
        (["fault", "--clear", "99"], "99"),
        (["send", '{"command": "status", "x": 1}'], "no key 'x'"),
        (["figures", "--after", "-1"], "after -1"),
    ],
)
def test_what_the_server_refuses_is_named_in_a_line(
    lasting: RunningServer, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line on stderr, status 1, nothing on stdout."""
    # On a busy machine another line may say that the server is slow to answer. It is not what is counted.
    monkeypatch.setattr("vfu_dev.cli.ctl.UNREAD_SECONDS", PATIENCE_SECONDS)
    done = ctl(lasting, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["load"], "expected a load"),
        (["load", "--off", "--write-rate", "1M"], "expected a load"),
        (["load", "--write-rate", "1M", "--dirty-rate", "1M"], "--dirty-rate and --write-rate: expected one"),
        (["load", "--write-rate", "5p"], "not a size: '5p'"),
        (["load", "--dirty-rate", "fast"], "dirty rate 'fast': expected bytes of pages"),
        (["load", "--write-rate", "1M", "--duration", "-1"], "--duration"),
        (["load", "--write-rate", "1M", "--write-size", "2M"], "--write-size 2097152: expected"),
        (["load", "--write-rate", "1M", "--burst", "1"], "DUTY:SECONDS"),
        (["load", "--spec", "/nowhere.toml"], "/nowhere.toml"),
        (["fault"], "expected a fault"),
        (["send", "{"], "not JSON"),
        (["send", "[]"], "command"),
        (["statsu"], "did you mean 'status'?"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(
    lasting: RunningServer, arguments: list[str], said: str
) -> None:
    """Status 2, and nothing on stdout."""
    done = ctl(lasting, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_every_command_is_documented(lasting: RunningServer) -> None:
    """docs/control.md and `ctl --help` have every command, with the keys that it takes."""
    rows = [line.split("|") for line in DOCUMENT.splitlines() if line.startswith("| `")]
    documented = {row[1].strip(" `"): set(re.findall(r"`([a-z]+)`", row[2])) for row in rows}
    help_text = ctl(lasting, "--help").stdout
    with lasting.control() as control:
        for name, keys in documented.items():
            assert f"\n  {name}" in help_text
            with pytest.raises(ControlError, match="no key 'nothing'") as refused:
                control.command(name, nothing=1)
            known = str(refused.value).rpartition("; ")[2].removeprefix("there are ")
            assert keys == (set(known.split(", ")) if known != "it takes nothing" else set())
        with pytest.raises(ControlError) as unknown:
            control.command("help")
    assert set(str(unknown.value).rpartition("one of ")[2].split(", ")) == set(documented)


# --- whatever is sent ---------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 2**64, 0])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\0", "\ud800", "x" * 5000, "memory", "all", "DEBUG"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(
    [
        "status",
        "figures",
        "digest",
        "checksums",
        "load",
        "load-status",
        "reinit",
        "fault",
        "faults",
        "dma-log",
        "log-level",
        "quit_",
        "x",
    ]
)
keys = st.sampled_from(
    ["load", "memory", "seconds", "pages", "after", "fault", "clear", "enabled", "level", "x"]
)
load_keys = st.sampled_from(
    [
        "pattern",
        "rate",
        "rate_bytes",
        "rate_pages",
        "dirty_rate",
        "dirty_rate_bytes",
        "write_rate",
        "write_size",
        "write_bytes",
        "seed",
        "burst",
        "phases",
        "trace",
        "duty",
        "period_seconds",
        "hot_fraction",
        "hot_share",
        "zipf_exponent",
        "op",
        "action",
        "count",
        "delay",
    ]
)
loads = st.dictionaries(load_keys, json_values | st.sampled_from(["1M", "uniform", "5p", 1, 0.5]), max_size=5)
requests = st.builds(
    lambda name, more: {"command": name, **more},
    names | json_values,
    st.dictionaries(keys, json_values | loads, max_size=4),
).map(lambda request: json.dumps(request).encode())
lines = (
    requests
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=200)
    | st.sampled_from(
        [
            b"[" * 60_000,
            b'{"a":' * 10_000,
            b"9" * 60_000,
            b'{"command":' + b" " * 60_000 + b"1}",
            b"\0" * 1000,
        ]
    )
).map(lambda line: line.replace(b"\n", b" "))


def exchange(server: RunningServer, data: bytes, answers: int) -> list[dict[str, Any]]:
    """Send `data` on a connection of its own and return the answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_SECONDS)
        client.connect(str(server.control_path))
        client.sendall(data)
        file = client.makefile("rb")
        return [json.loads(file.readline()) for _ in range(answers)]


# One server for all examples; and how long they take is the machine's business.
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=300, deadline=None, suppress_health_check=UNCHECKED)
@given(st.lists(lines, min_size=1, max_size=5))
def test_every_line_is_answered(lasting: RunningServer, sent: list[bytes]) -> None:
    """Whatever a line holds, there is one answer of the right shape for it, and the server goes on."""
    expected = sum(bool(line.strip()) for line in sent)
    for reply in exchange(lasting, b"".join(line + b"\n" for line in sent), expected):
        assert set(reply) in ({"ok", "result"}, {"ok", "error"})
        assert reply["ok"] is ("result" in reply)
        if not reply["ok"]:
            assert isinstance(reply["error"], str)
            assert len(reply["error"]) < 5000
    assert lasting.process.poll() is None


@settings(max_examples=60, deadline=None, suppress_health_check=UNCHECKED)
@given(st.lists(lines, max_size=3), st.binary(max_size=300), st.booleans())
def test_half_a_line_and_away(
    lasting: RunningServer, sent: list[bytes], half: bytes, half_close: bool
) -> None:
    """A client may leave in the middle of anything, with answers unread; the next one is served."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(lasting.control_path))
        client.sendall(b"".join(line + b"\n" for line in sent) + half)
        if half_close:
            client.shutdown(socket.SHUT_WR)
    assert exchange(lasting, b'{"command": "load-status"}\n', 1)[0]["ok"]


def test_afterwards_it_serves_as_before(lasting: RunningServer) -> None:
    """After all of that: no load, no fault, a device that can be written, and no traceback in the log."""
    with lasting.control() as control:
        control.command("fault", clear="all")
        control.command("load", load=None)
    with lasting.connect() as device:
        device.region_write(2, 0, b"still here")
        assert device.region_read(2, 0, 10) == b"still here"


def test_a_guest_is_served_meanwhile(lasting: RunningServer) -> None:
    """A flood of requests does not keep the device's client waiting for its end; it comes to its end too."""
    with lasting.connect() as device, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(lasting.control_path))
        client.setblocking(False)
        asked = answered = between = 0

        def take() -> None:
            nonlocal answered
            with suppress(BlockingIOError):
                answered += client.recv(1 << 20).count(b"\n")

        # A flood without an end: each of the reads that count came back before the answers did.
        while between < 20:
            if asked - answered < 100:
                client.sendall(b'{"command": "checksums"}\n' * 100)
                asked += 100
            device.region_read(2, 0, 8)
            take()
            between += answered < asked
        wait_until(lambda: take() or answered == asked, "every request is answered")


def test_a_large_recording_is_read_beside_the_guest(lasting: RunningServer, tmp_path: Path) -> None:
    """A load that takes long to prepare does not keep the device's client waiting for its end."""
    path = tmp_path / "long.csv"
    rows = "".join(f"{n / 1000},{n % 1000 * 8},8\n" for n in range(1, 300_001))
    path.write_text(f"time,offset,length\n{rows}")
    request = json.dumps({"command": "load", "load": {"trace": str(path)}}).encode() + b"\n"
    fds = Path(f"/proc/{lasting.process.pid}/fd")
    with lasting.connect() as device, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0)
        client.connect(str(lasting.control_path))

        def is_being_read() -> bool:
            return any(os.path.realpath(fd) == str(path) for fd in fds.iterdir())

        def served_meanwhile() -> bool:
            client.send(request)
            served, answered = False, b""
            while not answered:
                began = is_being_read()
                device.region_read(2, 0, 8)
                served = served or (began and is_being_read())
                with suppress(BlockingIOError):
                    answered = client.recv(1 << 16)
            assert json.loads(answered)["result"]["running"]
            return served

        # Nothing is seen of it where this process gets no processor meanwhile.
        assert any(served_meanwhile() for _ in range(10))
    answer(lasting, "load", "--off")


def test_load_files(lasting: RunningServer, tmp_path: Path) -> None:
    """--spec takes TOML or JSON, phases and all; other options change it."""
    path = tmp_path / "load.toml"
    path.write_text(
        'phases = [{seconds = 1, load = {rate = "1M", write_bytes = "4K"}}, {seconds = 2, load = {}}]\n'
    )
    assert [part["seconds"] for part in answer(lasting, "load", "--spec", path)["load"]["phases"]] == [1, 2]
    flat = tmp_path / "load.json"
    flat.write_text('{"pattern": "zipf", "rate_bytes": 5, "seed": 9}')
    changed = answer(lasting, "load", "--spec", flat, "--dirty-rate", "7p")["load"]
    assert changed == {"pattern": "zipf", "seed": 9, "rate_pages": 7, "write_bytes": 8, "zipf_exponent": 1.0}
    answer(lasting, "load", "--off")
    flat.write_text("[]")
    assert "expected an object" in ctl(lasting, "load", "--spec", flat).stderr
