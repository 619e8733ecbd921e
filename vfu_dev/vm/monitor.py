"""A QEMU's monitor: QMP commands and events, of any QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError
from qemu.qmp.qmp_client import GreetingError

from vfu_dev.errors import LabError
from vfu_dev.vm.process import PATIENCE_SECONDS
from vfu_dev.vm.trace import TraceEvent

# A QEMU with nothing to send makes thousands of passes a second. Of those in a row the last stands for what
# is beyond this number.
PASS, KEPT_PASSES = "MIGRATION_PASS", 1000


class QmpError(LabError):
    """QEMU refused a QMP command or is gone. Attributes: `command`, `reason`."""

    def __init__(self, name: str, command: str, reason: str) -> None:
        super().__init__(f"{name}: QMP {command}: {reason}")
        self.command = command
        self.reason = reason


class Monitor:
    """A connection to a QEMU's QMP socket.

    Attributes:
        events: all QMP events since the connection, with Unix time; see KEPT_PASSES.
    """

    def __init__(self, name: str, qmp_socket: Path) -> None:
        self.name = name
        self.qmp_socket = qmp_socket
        self.events: list[dict[str, Any]] = []
        self._qmp = QMPClient(name)
        # Its own negotiation takes an event that comes first for the answer (see `_connect`).
        self._qmp.negotiate = False
        # It warns of an answer that nobody waits for any more: one that came after a time limit.
        self._qmp.logger.setLevel(logging.ERROR)
        self._listener = EventListener()
        self._passes = 0  # in a row
        self._collector: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    @property
    def command_line(self) -> list[str]:
        """Its command line; empty if not known."""
        return []

    def _check(self, what: str = "ended unexpectedly") -> None:
        """Raise LabError if QEMU is known to have ended."""

    async def _end_of(self, error: Exception) -> None:
        """Wait for the end of a QEMU whose monitor failed, if it is a child process."""

    async def connect(self) -> None:
        """Connect to a monitor that listens. Raises: QmpError: it does not, or has another client."""
        self._qmp.register_listener(self._listener)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._connect()
        except (QMPError, OSError, TimeoutError) as error:
            await self._end_of(error)
            self._check("ended before its monitor answered")
            raise QmpError(self.name, "connect", str(error) or "no answer") from error
        self._collector = asyncio.create_task(self._collect())

    async def _connect(self) -> None:
        """Get the greeting, and leave QMP's mode of negotiation.

        An event may come before the greeting, or between that and the answer to the first command: any
        thread of QEMU sends events, and the monitor's own thread greets. QEMU 10.2, monitor/monitor.c,
        monitor_qapi_event_emit: it reads `commands` without a lock, which until the greeting is not set, or
        is that of the client before.
        """
        while True:
            try:
                await self._qmp.connect(str(self.qmp_socket))
                break
            except ConnectError as error:
                if not self._is_early(error):
                    raise
            except AssertionError as error:
                # qemu.qmp asserts that the connection it has just made still stands. QEMU has ended.
                raise ConnectionResetError("the connection ended with its greeting") from error
            await asyncio.sleep(0.01)
        greeting = self._qmp.greeting
        oob = greeting is not None and "oob" in greeting.QMP.capabilities
        await self._qmp.execute("qmp_capabilities", {"enable": ["oob"]} if oob else None)

    def _is_early(self, error: ConnectError) -> bool:
        """Say whether the same connection may succeed a moment later: another message came first."""
        return isinstance(error.exc, GreetingError) and isinstance(error.exc.exc, KeyError)

    async def disconnect(self) -> None:
        """Hang up; QEMU goes on."""
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            await asyncio.wait_for(self._qmp.disconnect(), 2.0)
        if self._collector is not None:
            self._collector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collector

    async def _collect(self) -> None:
        async for event in self._listener:
            stamp = cast(dict[str, int], event["timestamp"])
            record = {
                "time": stamp["seconds"] + stamp["microseconds"] / 1e6,
                "event": event["event"],
                "data": event.get("data", {}),
            }
            self._keep(record)
            async with self._changed:
                self._changed.notify_all()

    def _keep(self, record: dict[str, Any]) -> None:
        """Keep an event; of passes without end, with no other event between them, only the last one."""
        self._passes = self._passes + 1 if record["event"] == PASS else 0
        if self._passes > KEPT_PASSES:
            self.events[-1] = record
        else:
            self.events.append(record)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; underscores in argument names stand for hyphens.

        Raises: QmpError: QEMU refused, ended or did not answer in time.
        """
        renamed = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._check("is not running")
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await self._qmp.execute(command, renamed or None)
        except ExecuteError as error:
            raise QmpError(self.name, command, str(error)) from error
        except (QMPError, OSError, TimeoutError) as error:
            await self._end_of(error)
            self._check(f"ended during QMP {command}")
            raise QmpError(self.name, command, str(error) or "no answer") from error

    def _matching(self, name: str, first: int, **data: Any) -> Iterator[dict[str, Any]]:
        for event in self.events[first:]:
            if event["event"] == name and all(event["data"].get(key) == data[key] for key in data):
                yield event

    async def wait_event(
        self, name: str, timeout_seconds: float = PATIENCE_SECONDS, first: int = 0, **data: Any
    ) -> dict[str, Any]:
        """Return the first event `name` from place `first` of `events` on whose data contain `data`.

        Their order tells what came later, not their times: somebody may set the clock back meanwhile.

        Raises: LabError: it does not come in time. ProcessError: QEMU ended, if it is ours.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = next(self._matching(name, first, **data), None)
            if found is not None:
                return found
            self._check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise LabError(f"{self.name}: no {name} event {data or ''} in {timeout_seconds:g} s")
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(left, 0.2))

    async def migration(self) -> dict[str, Any]:
        """Return `query-migrate`; empty before the first migration."""
        result: dict[str, Any] = await self.execute("query-migrate")
        return result

    async def run_state(self) -> str:
        """Return the VM's run state (`running`, `postmigrate`, …)."""
        result: dict[str, Any] = await self.execute("query-status")
        return str(result["status"])

    def trace(self) -> list[TraceEvent]:
        """Return the VFIO trace events so far; none without a trace."""
        return []
