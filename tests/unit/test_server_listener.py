"""Who gets in at the door of the vfio-user socket, and who makes room, in a loop that is turned by hand."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfu_dev.server import listener as listener_module
from vfu_dev.server.door import Access, Door
from vfu_dev.server.listener import MAX_NEWCOMERS, Listener
from vfu_dev.uapi import VFIO_USER_HEADER, VFIO_USER_VERSION

VERSION = VFIO_USER_HEADER.pack(1, VFIO_USER_VERSION, VFIO_USER_HEADER.size + 4, 0, 0) + bytes(4)


class StrangersDoor(Door):
    """A door at which those who are counted among the strangers may not be the client."""

    strangers = 0

    def accept(self) -> socket.socket | None:
        """Take the next connection; the first `strangers` of them are refused."""
        self.access = Access(users=frozenset({os.getuid()}))
        if self.strangers:
            self.strangers -= 1
            self.access = _Closed()
        return super().accept()


class _Closed(Access):
    def refusal(self, connection: socket.socket) -> str | None:
        return "a stranger"


class Loop:
    """A listener, and the loop that it is part of."""

    def __init__(self, door: Door | socket.socket) -> None:
        self.admitted: list[socket.socket] = []
        self.occupied = False
        self.selector = selectors.DefaultSelector()
        self.listener = Listener(door, self.selector, lambda: self.occupied, self._admit, "d")

    def _admit(self, connection: socket.socket, version: bytes) -> None:
        assert version == VERSION
        self.admitted.append(connection)

    def turn(self) -> None:
        """Do what there is to do, until nothing is left that needs no waiting."""
        while found := self.selector.select(0):
            for key, _ in found:
                key.data()
        self.listener.advance()

    def close(self) -> None:
        """Close everything."""
        self.listener.close()
        self.selector.close()
        for connection in self.admitted:
            connection.close()


def errno_of(reply: bytes) -> int:
    """Return the error of a reply's header."""
    return int(VFIO_USER_HEADER.unpack(reply)[4])


def connected(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(os.fspath(path))
    peer.setblocking(False)
    return peer


def asking(path: Path) -> socket.socket:
    """Return a connection that has sent its VERSION message."""
    peer = connected(path)
    peer.sendall(VERSION)
    return peer


@pytest.fixture
def door(short_tmp: Path) -> StrangersDoor:
    made = StrangersDoor.at(short_tmp / "s", "socket", 4 * MAX_NEWCOMERS)
    assert isinstance(made, StrangersDoor)
    return made


@pytest.fixture
def loop(door: StrangersDoor, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    for name in ("SILENT_SECONDS", "BUSY_SILENT_SECONDS", "BUSY_SECONDS"):
        monkeypatch.setattr(listener_module, name, 1e6)  # nobody goes because of the time
    made = Loop(door)
    yield made
    made.close()


def test_strangers_take_no_place_of_a_client_that_waits(
    loop: Loop, door: StrangersDoor, short_tmp: Path
) -> None:
    """It waits for the last client to be gone, while others come who may not be the client anyway."""
    loop.occupied = True
    client = asking(short_tmp / "s")
    loop.turn()
    door.strangers = 2 * MAX_NEWCOMERS
    strangers = [connected(short_tmp / "s") for _ in range(2 * MAX_NEWCOMERS)]
    loop.turn()
    assert not door.strangers
    loop.occupied = False
    loop.turn()
    assert len(loop.admitted) == 1
    for peer in (client, *strangers):
        peer.close()


def test_who_has_said_nothing_makes_room_before_who_has_said_who_it_is(loop: Loop, short_tmp: Path) -> None:
    loop.occupied = True
    client = asking(short_tmp / "s")
    loop.turn()
    silent = [connected(short_tmp / "s") for _ in range(2 * MAX_NEWCOMERS)]
    loop.turn()
    loop.occupied = False
    loop.turn()
    assert len(loop.admitted) == 1
    for peer in (client, *silent):
        peer.close()


def test_a_stranger_takes_no_place_where_all_are_taken_by_others(
    loop: Loop, door: StrangersDoor, short_tmp: Path
) -> None:
    loop.occupied = True
    others = [connected(short_tmp / "s") for _ in range(MAX_NEWCOMERS)]
    loop.turn()
    door.strangers = 1
    stranger = connected(short_tmp / "s")
    loop.turn()
    assert stranger.recv(1) == b""
    for peer in others:
        with pytest.raises(BlockingIOError):
            peer.recv(1)
        peer.close()
    stranger.close()


def test_what_came_while_the_loop_did_not_run_counts_before_the_time(
    loop: Loop, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last client has left, and a message has come, a turn after the time was found to be over."""
    loop.occupied = True
    client = asking(short_tmp / "s")
    loop.turn()
    late = connected(short_tmp / "s")
    loop.turn()
    for name in ("BUSY_SILENT_SECONDS", "BUSY_SECONDS"):
        monkeypatch.setattr(listener_module, name, 0.0)
    loop.turn()
    assert loop.listener.timeout() == 0
    late.sendall(VERSION)
    loop.occupied = False
    loop.turn()
    assert len(loop.admitted) == 2
    for peer in (client, late):
        peer.close()


def test_a_message_that_came_late_gives_its_sender_a_time_of_its_own(
    loop: Loop, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the time for the message was over says nothing of the time for the last client to leave."""
    loop.occupied = True
    late = connected(short_tmp / "s")
    for name in ("BUSY_SILENT_SECONDS", "BUSY_SECONDS"):
        monkeypatch.setattr(listener_module, name, 0.0)
    loop.turn()
    late.sendall(VERSION)
    loop.turn()
    loop.occupied = False
    loop.turn()
    assert len(loop.admitted) == 1
    late.close()


def test_who_waits_longer_than_the_time_is_turned_away(
    loop: Loop, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.occupied = True
    client = asking(short_tmp / "s")
    monkeypatch.setattr(listener_module, "BUSY_SECONDS", 0.0)
    loop.turn()
    loop.turn()
    assert errno_of(client.recv(64)) == errno.EBUSY
    client.close()


def test_a_connection_that_was_handed_over_is_let_in_by_the_loop() -> None:
    """Whoever makes the listener is not ready to admit anybody, though the client has said all it has to."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(VERSION)
        loop = Loop(ours)
        assert loop.admitted == []
        loop.turn()
        assert loop.admitted == [ours]
        loop.close()


def test_a_connection_that_was_handed_over_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the only client there will ever be, and nobody waits behind it."""
    monkeypatch.setattr(listener_module, "SILENT_SECONDS", 0.0)
    ours, theirs = socket.socketpair()
    with theirs:
        loop = Loop(ours)
        assert loop.listener.timeout() is None
        loop.turn()
        assert not loop.listener.is_over
        theirs.sendall(VERSION)
        loop.turn()
        assert loop.admitted == [ours]
        loop.close()
