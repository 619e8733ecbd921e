"""Guests that write to the device, remember what they wrote, and check it after the move.

`Guest` is what an experiment needs of one. `LinuxGuest` commands native/guest/vfud-load over a serial port;
`QtestGuest` (qtest_guest.py) plays the guest itself where no CPU runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfu_dev.errors import LabError
from vfu_dev.lab.qemu import Qemu
from vfu_dev.lab.result import GuestResult

PAGE_BYTES = 4096
PATTERNS = ("uniform", "sequential", "hotset")

# Told (bytes compared, bytes in all) while a guest verifies.
VerifyProgress = Callable[[int, int], None]

# TCG under a loaded machine needs about 10 s to reach init; ten times that is a hang.
BOOT_TIMEOUT_SECONDS = 120.0
COMMAND_TIMEOUT_SECONDS = 20.0
# A full read-back is one trapped round trip (40-60 us) for each 8 bytes; silence this long is a hang.
VERIFY_SILENCE_SECONDS = 120.0


class GuestError(LabError):
    """The guest did not answer, or refused a command."""


@dataclass(frozen=True)
class LoadPlan:
    """What the guest writes. One write of 8 bytes dirties one page, so `rate_bytes` / 4096 writes a second.

    `rate_bytes`: bytes of pages dirtied a second in each device; 0 writes nothing. `hot_fraction` of the
    pages gets `hot_share` of the writes in the pattern `hotset`.
    """

    rate_bytes: int = 2 << 20
    pattern: str = "uniform"
    seed: int = 1
    hot_fraction: float = 0.1
    hot_share: float = 0.9

    @property
    def writes_per_second(self) -> float:
        """Writes a second in each device."""
        return self.rate_bytes / PAGE_BYTES


class Guest(ABC):
    """What an experiment asks of a guest. Calls are in the order of the methods."""

    kind: str

    @abstractmethod
    async def ready(self, source: Qemu) -> None:
        """Wait until the guest runs on `source` and has found its devices. Raises: GuestError."""

    @abstractmethod
    async def start(self, plan: LoadPlan) -> None:
        """Begin to write."""

    @abstractmethod
    async def follow(self, destination: Qemu) -> None:
        """Go on talking to the guest on `destination`, where it now runs."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop writing."""

    @abstractmethod
    async def verify(self, progress: VerifyProgress | None = None) -> GuestResult:
        """Compare all device memory with the journal. Raises: GuestError: the guest is gone or silent."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of connections."""


class LineChannel:
    """The serial line of vfud-load: commands out, JSON lines in."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self._replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, qemu: Qemu) -> None:
        """Connect to the serial port of `qemu`."""
        reader, self._writer = await asyncio.open_unix_connection(str(qemu.line_socket))
        self._task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                # A line cut by the move to another host is not JSON; whoever waits for it times out.
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if "reply" in message:
                        self._replies.put_nowait(message)
                    else:
                        self._on_event({**message, "time": time.time()})

    def send(self, text: str) -> None:
        """Send one command line."""
        if self._writer is None:
            raise GuestError("no serial line to the guest")
        self._writer.write(text.encode() + b"\n")

    async def reply(self, command: str, timeout_seconds: float) -> dict[str, Any]:
        """Return the next reply to `command`. Raises: GuestError: none, or `ok` is false."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    message = await self._replies.get()
                    if message["reply"] == command:
                        break
        except TimeoutError as error:
            raise GuestError(f"guest: no reply to {command!r} in {timeout_seconds:g} s") from error
        if not message.get("ok"):
            raise GuestError(f"guest: {command}: {message.get('error', 'refused')}")
        return message

    async def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task


class LinuxGuest(Guest):
    """A Linux guest that runs vfud-load."""

    kind = "linux"

    def __init__(self, tick_ms: int = 25) -> None:
        self._tick_ms = tick_ms
        self._line: LineChannel | None = None
        self._qemu: Qemu | None = None
        self._plan = LoadPlan(rate_bytes=0)
        self.events: list[dict[str, Any]] = []
        self._last_event = 0.0
        self._progress: VerifyProgress | None = None
        self._load: dict[str, Any] = {}
        self._moved_at: int | None = None
        self._devices = 0

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._last_event = time.monotonic()
        if event.get("event") == "progress" and self._progress is not None:
            self._progress(event["compared_bytes"], event["total_bytes"])

    async def _attach(self, qemu: Qemu) -> LineChannel:
        if self._line is not None:
            await self._line.close()
        self._qemu = qemu
        self._line = LineChannel(self._note)
        await self._line.connect(qemu)
        return self._line

    async def command(self, text: str, timeout_seconds: float = COMMAND_TIMEOUT_SECONDS) -> dict[str, Any]:
        """Run one command of vfud-load and return its reply. Raises: GuestError."""
        if self._line is None:
            raise GuestError("the guest has not been started")
        self._line.send(text)
        return await self._line.reply(text.split(" ", 1)[0], timeout_seconds)

    async def ready(self, source: Qemu) -> None:
        """Wait for the guest's program: ask until it answers (its greeting may precede our connection)."""
        await self._attach(source)
        deadline = time.monotonic() + BOOT_TIMEOUT_SECONDS
        while True:
            source.process.check()
            try:
                status = await self.command("status", 2.0)
                break
            except GuestError:
                if time.monotonic() > deadline:
                    raise GuestError(
                        f"the guest is not up after {BOOT_TIMEOUT_SECONDS:g} s; console: {source.console_log}"
                    ) from None
        self._devices = int(status["devices"])
        if not self._devices:
            raise GuestError(f"the guest found no device; console: {source.console_log}")

    async def start(self, plan: LoadPlan) -> None:
        """Begin to write, with a heartbeat on the serial line."""
        self._plan = plan
        if plan.rate_bytes <= 0:
            return
        await self.command(
            f"start rate={plan.writes_per_second:.3f} pattern={plan.pattern} seed={plan.seed} "
            f"hot_fraction={plan.hot_fraction} hot_share={plan.hot_share} tick_ms={self._tick_ms}"
        )

    async def follow(self, destination: Qemu) -> None:
        """Talk to the destination's serial port from now on."""
        self._moved_at = len(self.events)
        await self._attach(destination)

    async def stop(self) -> None:
        """Stop writing and keep the figures of the load."""
        self._load = await self.command("stop")

    def _outage_ms(self) -> float | None:
        # Seen from outside: the last heartbeat from the source to the first from the destination.
        if self._moved_at is None:
            return None
        before = [event["time"] for event in self.events[: self._moved_at] if event.get("event") == "tick"]
        after = [event["time"] for event in self.events[self._moved_at :] if event.get("event") == "tick"]
        return (after[0] - before[-1]) * 1000 if before and after else None

    async def verify(self, progress: VerifyProgress | None = None) -> GuestResult:
        """Have the guest read everything back; it reports progress, and silence is an error."""
        if self._line is None or self._qemu is None:
            raise GuestError("the guest has not been started")
        self._progress = progress
        self._line.send("verify")
        self._last_event = time.monotonic()
        waiter = asyncio.create_task(self._line.reply("verify", 3600.0))
        try:
            while not waiter.done():
                await asyncio.wait([waiter], timeout=1.0)
                self._qemu.process.check()
                if time.monotonic() - self._last_event > VERIFY_SILENCE_SECONDS:
                    raise GuestError(f"guest: verify is silent for {VERIFY_SILENCE_SECONDS:g} s")
        finally:
            waiter.cancel()
        found = waiter.result()
        load = self._load
        seconds = load.get("elapsed_ns", 0) / 1e9
        reached = load.get("writes", 0) / max(self._devices, 1) * PAGE_BYTES / seconds if seconds else 0.0
        return GuestResult(
            kind=self.kind,
            verified=found["verified"],
            compared_bytes=found["compared_bytes"],
            mismatched_bytes=found["mismatched_bytes"],
            first_mismatch=found["first_mismatch"],
            scratch_errors=found["scratch_errors"],
            readback_checks=found["readback_checks"],
            readback_errors=found["readback_errors"],
            generation=found["generation"],
            writes=load.get("writes", 0),
            missed_writes=load.get("missed_writes", 0),
            asked_rate_bytes=self._plan.rate_bytes,
            reached_rate_bytes=reached,
            max_access_ms=load.get("max_access_ns", 0) / 1e6,
            max_gap_ms=load.get("max_gap_ns", 0) / 1e6,
            outage_ms=self._outage_ms(),
            verify_seconds=found["verify_ns"] / 1e9,
        )

    async def close(self) -> None:
        """Close the serial line."""
        if self._line is not None:
            await self._line.close()
