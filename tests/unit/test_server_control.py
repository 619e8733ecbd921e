"""The control socket answers everything, and survives everybody."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import socket
import stat
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfu_dev.errors import ConfigError
from vfu_dev.server import ControlSocket, door
from vfu_dev.server.control import MAX_CLIENTS, MAX_LINE_BYTES, MAX_UNSENT_BYTES
from vfu_dev.server.door import Access, Door
from vfu_dev.server.sockets import OwnedPath, SocketInUseError, claim_socket_path


class Loop:
    """A control socket and the loop around it, turned by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selector = selectors.DefaultSelector()
        self.control = ControlSocket(
            Door.at(path, "control socket", MAX_CLIENTS),
            self.selector,
            {"echo": lambda request: request, "slow": lambda _: self.slow(), "broken": lambda _: 1 / 0},
        )
        self.steps = 0

    def slow(self) -> Generator[None, None, str]:
        """Work in three steps."""
        for _ in range(3):
            self.steps += 1
            yield
        return "done"

    def turn(self) -> None:
        """Turn the loop once."""
        for key, _ in self.selector.select(0.2 if not self.control.busy else 0):
            key.data()
        if self.control.busy:
            self.control.advance()

    def connect(self) -> socket.socket:
        """Connect a client."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(os.fspath(self.path))
        client.setblocking(False)
        return client

    def answers(self, client: socket.socket, count: int) -> list[dict[str, Any]]:
        """Turn the loop until `count` answers arrived, and return them."""
        received = b""
        for _ in range(200):
            self.turn()
            with contextlib.suppress(BlockingIOError):
                received += client.recv(1 << 20)
            if received.count(b"\n") >= count:
                break
        return [json.loads(line) for line in received.splitlines()]


@pytest.fixture
def loop(short_tmp: Path) -> Iterator[Loop]:
    made = Loop(short_tmp / "control")
    yield made
    made.control.close()
    assert not made.path.exists()


def test_only_the_owner_can_open_it(loop: Loop) -> None:
    assert stat.S_IMODE(loop.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'{"command": 5}',
        b'{"command": {}}',
        b'{"command": "x"}',
        b"{}",
        b'{"command": "broken"}',
        b"[" * 30_000,
    ],
)
def test_a_bad_request_gets_an_error_and_the_next_one_an_answer(loop: Loop, line: bytes) -> None:
    with loop.connect() as client:
        client.send(line + b'\n{"command": "echo", "x": 1}\n')
        bad, good = loop.answers(client, 2)
    assert bad["ok"] is False
    assert bad["error"]
    assert good == {"ok": True, "result": {"command": "echo", "x": 1}}


def test_a_line_without_end_is_cut_off(loop: Loop) -> None:
    with loop.connect() as client:
        client.send(b"x" * MAX_LINE_BYTES)
        loop.turn()
        client.send(b"x")
        (answer,) = loop.answers(client, 1)
        assert "at most" in answer["error"]
        client.setblocking(True)
        assert client.recv(1) == b""


def test_slow_commands_share_the_loop(loop: Loop) -> None:
    """While one client's command works, another is answered; answers keep the order of requests."""
    with loop.connect() as slow, loop.connect() as quick:
        slow.send(b'{"command": "slow"}\n{"command": "echo"}\n')
        while not loop.control.busy:
            loop.turn()
        quick.send(b'{"command": "echo"}\n')
        assert loop.answers(quick, 1)[0]["ok"]
        assert [a["result"] for a in loop.answers(slow, 2)] == ["done", {"command": "echo"}]
    assert loop.steps == 3


def test_a_client_that_leaves_takes_its_command_along(loop: Loop) -> None:
    client = loop.connect()
    client.send(b'{"command": "slow"}\n')
    while not loop.control.busy:
        loop.turn()
    client.close()
    loop.turn()
    assert not loop.control.busy
    with loop.connect() as other:
        other.send(b'{"command": "echo"}\n')
        assert loop.answers(other, 1)[0]["ok"]


def test_a_client_that_only_stops_sending_gets_its_answers(loop: Loop) -> None:
    """As `nc` does: the requests, the end, and then waiting; it is let go when it has everything."""
    with loop.connect() as client:
        client.send(b'{"command": "slow"}\n{"command": "echo"}\n')
        client.shutdown(socket.SHUT_WR)
        assert [a["ok"] for a in loop.answers(client, 2)] == [True, True]
        client.setblocking(True)
        assert client.recv(1) == b""
    assert not loop.control.busy


def test_one_that_stops_sending_and_leaves_is_dropped(loop: Loop) -> None:
    client = loop.connect()
    client.send(b'{"command": "slow"}\n')
    client.shutdown(socket.SHUT_WR)
    while not loop.control.busy:
        loop.turn()
    client.close()
    loop.turn()
    assert not loop.control.busy


def test_one_that_leaves_answers_unread_is_dropped(loop: Loop) -> None:
    """A client that stopped sending and left while answers still waited ends nobody but itself."""
    leaver, other = loop.connect(), loop.connect()
    with other:
        # More answers than the socket's buffer takes, so that some stay with the server.
        request = json.dumps({"command": "echo", "x": "y" * 60_000}).encode() + b"\n"
        for _ in range(12):
            with contextlib.suppress(BlockingIOError):
                leaver.sendall(request)
            loop.turn()
        with contextlib.suppress(OSError):
            leaver.shutdown(socket.SHUT_WR)
        loop.turn()
        leaver.close()
        loop.turn()
        other.send(b'{"command": "echo"}\n')
        assert loop.answers(other, 1) == [{"ok": True, "result": {"command": "echo"}}]


def test_many_requests_at_once_share_the_loop(loop: Loop) -> None:
    """A flood from one client is served a few at a time, in order; another's request is not kept waiting."""
    with loop.connect() as flood, loop.connect() as other:
        requests = b"".join(b'{"command": "echo", "n": %d}\n' % n for n in range(1000))
        flood.send(requests)
        while not loop.control.busy:
            loop.turn()
        other.send(b'{"command": "echo"}\n')
        assert loop.answers(other, 1)[0]["ok"]
        assert loop.control.busy
        assert [a["result"]["n"] for a in loop.answers(flood, 1000)] == list(range(1000))


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Have every descriptor in use that this process may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert len(taken) >= 3
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_a_free_descriptor_clients_are_turned_away_and_the_loop_sleeps(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """One that waits in the listener's queue would make it readable for ever."""
    with contextlib.ExitStack() as stack:
        served, *late = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4))
        served.connect(os.fspath(loop.path))
        served.setblocking(False)
        loop.turn()
        with no_descriptor_left():
            for client in late:
                client.settimeout(10)
                client.connect(os.fspath(loop.path))
            for _ in late:
                loop.turn()
            assert loop.selector.select(0) == []
            assert [client.recv(1) for client in late] == [b"", b"", b""]
            # Whom it has, it serves.
            served.send(b'{"command": "echo"}\n')
            assert loop.answers(served, 1)[0]["ok"]
        with loop.connect() as client:
            client.send(b'{"command": "echo"}\n')
            assert loop.answers(client, 1)[0]["ok"]
    assert caplog.text.count("no file descriptor is free, a client was turned away") == 3


def test_clients_are_limited(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """One more than there may be is turned away, and the others are served."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(loop.connect()) for _ in range(MAX_CLIENTS)]
        for _ in clients:
            loop.turn()
        with loop.connect() as late:
            loop.turn()
            assert late.recv(1) == b""
        clients[0].send(b'{"command": "echo"}\n')
        assert loop.answers(clients[0], 1)[0]["ok"]
    assert f"control: more than {MAX_CLIENTS} clients, one turned away" in caplog.text


def test_strangers_keep_nobody_out(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not connect has no place that somebody else could have."""
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(Access, "refusal", lambda _self, _connection: "a stranger")
        strangers = [stack.enter_context(loop.connect()) for _ in range(MAX_CLIENTS)]
        for _ in strangers:
            loop.turn()
        monkeypatch.undo()
        friend = stack.enter_context(loop.connect())
        friend.send(b'{"command": "echo"}\n')
        assert loop.answers(friend, 1)[0]["ok"]
        strangers[-1].send(b'{"command": "echo"}\n')
        assert loop.answers(strangers[-1], 1) == [{"ok": False, "error": "a stranger"}]


def test_users_are_told_apart_without_proc_sys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The systemd unit hides /proc/sys from the server (ProcSubset=pid)."""
    monkeypatch.setattr(door, "_OVERFLOW_UID", Path("/proc/self/no-such-file"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Access(users=frozenset({os.geteuid()})).refusal(ours) is None
        monkeypatch.setattr(door, "_DEFAULT_OVERFLOW_UID", os.geteuid())
        assert Access(users=frozenset({os.geteuid()})).refusal(ours) is not None


def test_answers_that_nobody_reads_are_limited(loop: Loop) -> None:
    """A client that reads no answers is dropped when more than MAX_UNSENT_BYTES wait for it."""
    request = json.dumps({"command": "echo", "x": "y" * 60_000}).encode() + b"\n"
    with loop.connect() as greedy:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = 0
            while sent < 4 * MAX_UNSENT_BYTES:
                with contextlib.suppress(BlockingIOError):
                    sent += greedy.send(request)
                loop.turn()
        assert sent < 2 * MAX_UNSENT_BYTES
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            greedy.send(request)


def test_a_control_socket_gives_back_what_it_took(short_tmp: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with selectors.DefaultSelector() as selector:
        ControlSocket(Door.at(short_tmp / "c", "control socket", MAX_CLIENTS), selector, {}).close()
        with pytest.raises(ConfigError, match="control socket /proc/c: "):
            Door.at(Path("/proc/c"), "control socket", MAX_CLIENTS)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_path_with_a_nul_character_is_refused_in_words(short_tmp: Path) -> None:
    with pytest.raises(ConfigError, match=r"socket '.*a\\x00b': a path cannot have a NUL character"):
        claim_socket_path(short_tmp / "a\0b", "socket")


def test_paths_of_the_dead_are_free_and_of_the_living_are_not(loop: Loop, short_tmp: Path) -> None:
    with pytest.raises(SocketInUseError, match="alive"):
        claim_socket_path(loop.path, "socket")
    dead = short_tmp / "dead"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(dead))
    claim_socket_path(dead, "socket")
    assert not dead.exists()
    dead.write_text("a file")
    with pytest.raises(ConfigError, match="not a socket"):
        claim_socket_path(dead, "socket")
    with pytest.raises(ConfigError, match="no folder"):
        claim_socket_path(Path("nowhere/x"), "socket")
    with pytest.raises(ConfigError, match="longer"):
        claim_socket_path(Path("x" * 120), "socket")


def test_a_path_that_somebody_else_took_over_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    owned = OwnedPath(path)
    path.rename(tmp_path / "moved")  # its inode stays taken, so the next file gets another
    path.touch()
    owned.remove()
    assert path.exists()
