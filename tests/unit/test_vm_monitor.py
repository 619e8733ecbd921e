"""A QEMU's monitor whose events come at the wrong moment, played by a server with that order."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import Runstate
from qmpkit import commands, event_of, greeting, line_of
from serverkit import PATIENCE_SECONDS

import vfu_dev
from vfu_dev.errors import LabError
from vfu_dev.lab.pausing import PAUSED, going_on
from vfu_dev.vm.monitor import KEPT_PASSES, PASS, Monitor, QmpError

ROOT = Path(vfu_dev.__file__).parent
GREETING = greeting("oob")
EVENT = event_of("RESUME")


class Server:
    """A QMP server; `asked` are the commands that it got, of all its connections.

    Args: before: of each connection, what is sent before the greeting. after: what is sent after it.
    """

    def __init__(self, before: list[list[Any]], after: list[Any]) -> None:
        self.before = before
        self.after = after
        self.connections = 0
        self.asked: list[dict[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        early = self.before[min(self.connections, len(self.before) - 1)]
        self.connections += 1
        for message in [*early, GREETING, *self.after]:
            writer.write(message if isinstance(message, bytes) else line_of(message))
        async for command in commands(reader):
            self.asked.append(command)
            answer: dict[str, Any] = {"return": {}}
            if command["execute"] == "query-status":
                answer = {"return": {"status": "running"}}
            writer.write(line_of({**answer, "id": command["id"]}))
        writer.close()


async def talk(server: Server, folder: Path) -> Monitor:
    """Connect to it, ask for the run state, and hang up."""
    listening = await asyncio.start_unix_server(server.serve, folder / "qmp")
    monitor = Monitor("source", folder / "qmp")
    try:
        await monitor.connect()
        assert await monitor.run_state() == "running"
        if server.after:
            await monitor.wait_event("RESUME")
    finally:
        await monitor.disconnect()
        listening.close()
    return monitor


def test_an_event_between_greeting_and_answer_is_an_event(tmp_path: Path) -> None:
    """The negotiation ends well, and nothing is lost."""
    server = Server([[]], [EVENT])
    monitor = asyncio.run(talk(server, tmp_path))
    assert [event["event"] for event in monitor.events] == ["RESUME"]
    assert [command["execute"] for command in server.asked] == ["qmp_capabilities", "query-status"]
    assert server.asked[0]["arguments"] == {"enable": ["oob"]}


def test_an_event_before_the_greeting_means_once_more(tmp_path: Path) -> None:
    """Of three connections the first two have an event first; the third one stays."""
    server = Server([[EVENT], [EVENT], []], [])
    asyncio.run(talk(server, tmp_path))
    assert server.connections == 3
    assert [command["execute"] for command in server.asked] == ["qmp_capabilities", "query-status"]


def test_what_is_no_monitor_is_said_at_once(tmp_path: Path) -> None:
    """Another protocol on the socket: an error that says so, after one connection."""
    server = Server([[b"SSH-2.0-OpenSSH\r\n"]], [])
    with pytest.raises(QmpError, match=r"source: QMP connect: .*Greeting"):
        asyncio.run(talk(server, tmp_path))
    assert server.connections == 1


def test_a_qemu_that_ends_with_its_greeting_is_an_error_of_its_own(tmp_path: Path) -> None:
    """Seen on a busy machine: the connection was gone before qemu.qmp's connect() returned, which asserts."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line_of(GREETING))
        writer.close()

    async def meet() -> None:
        monitor = Monitor("source", tmp_path / "qmp")
        establish = monitor._qmp._establish_session

        async def late() -> None:
            await establish()
            while monitor._qmp.runstate == Runstate.RUNNING:
                await asyncio.sleep(0.01)

        monitor._qmp._establish_session = late  # type: ignore[method-assign]
        async with await asyncio.start_unix_server(greet, tmp_path / "qmp"):
            with pytest.raises(QmpError, match="source: QMP connect: the connection ended with its greeting"):
                await monitor.connect()
            await monitor.disconnect()

    asyncio.run(asyncio.wait_for(meet(), PATIENCE_SECONDS))


def test_passes_without_end_leave_the_last(tmp_path: Path) -> None:
    """Of 5000 passes in a row the first 999 and the last stay, and what is no pass always."""
    passes = [event_of(PASS, **{"pass": number}) for number in range(1, 5001)]
    monitor = asyncio.run(talk(Server([[]], [*passes, EVENT, passes[0]]), tmp_path))
    found = [event["data"].get("pass") for event in monitor.events]
    assert found == [*range(1, KEPT_PASSES), 5000, None, 1]


def test_events_are_told_apart_by_their_order_whatever_the_clock_did(tmp_path: Path) -> None:
    """A clock that is set back makes the event that is waited for older than the moment it is waited from."""
    monitor = Monitor("source", tmp_path / "qmp")
    for number, moment in enumerate((100.0, 50.0)):
        monitor._keep({"time": moment, "event": "MIGRATION", "data": {"number": number}})
    found = asyncio.run(monitor.wait_event("MIGRATION", 1.0, first=1))
    assert found["data"] == {"number": 1}
    with pytest.raises(LabError, match="no MIGRATION event"):
        asyncio.run(monitor.wait_event("MIGRATION", 0.0, first=2))


def test_a_pause_before_the_switchover_is_answered_whatever_the_clock_did(tmp_path: Path) -> None:
    """That of an earlier migration is not, be its time the later one."""

    asked: list[str] = []

    class Asked(Monitor):
        async def execute(self, command: str, **arguments: Any) -> Any:
            asked.append(command)

    def pause(seconds: float) -> dict[str, Any]:
        return {"time": seconds, "event": "MIGRATION", "data": {"status": PAUSED}}

    async def migrate() -> None:
        monitor = Asked("source", tmp_path / "qmp")
        monitor._keep(pause(time.time() + 1000))
        async with going_on(monitor, 100.0):
            for _ in range(3):
                await asyncio.sleep(0)
            assert asked == []
            monitor._keep(pause(0.0))
            while not asked:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(migrate(), 60.0))
    assert asked == ["migrate-continue"]


def test_nobody_else_connects_to_a_qmp_socket() -> None:
    """What this monitor survives, every part of vfu-dev does."""
    modules = {path for path in ROOT.rglob("*.py") if "QMPClient" in path.read_text()}
    assert modules == {ROOT / "vm" / "monitor.py"}
