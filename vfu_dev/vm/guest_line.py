"""Talking to vfud-load, the program in the Linux guest: commands out, JSON lines in, over a serial port.

docs/guest.md lists the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vfu_dev.errors import LabError
from vfu_dev.vm.guest_program import program_lines
from vfu_dev.vm.process import PATIENCE_SECONDS
from vfu_dev.workload import Workload
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES

# How the guest's writes reach the device: by its CPU, or fetched by the device's DMA engine.
Transport = Literal["mmio", "dma"]


# vfud-load refuses it by its name, after the replies to everything before it.
_NO_COMMAND = "catch-up"


class GuestError(LabError):
    """The guest did not answer, or refused a command."""


class GuestLine:
    """One connection to the serial port of vfud-load.

    Args: on_event: called with each line that is no reply; `time` (Unix seconds) is added to it.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self._on_event = on_event
        self._replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, socket: Path) -> None:
        """Connect to QEMU's end of the port, a UNIX socket. Raises: OSError."""
        # lspci -vvv and the kernel's messages come as one line.
        reader, self._writer = await asyncio.open_unix_connection(str(socket), limit=1 << 20)
        self._task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                # A line cut by the move to another host is not JSON; its reader times out.
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if "reply" in message:
                        self._replies.put_nowait(message)
                    else:
                        self._on_event({**message, "time": time.time()})

    def send(self, text: str) -> None:
        """Send one command line. Raises: GuestError: not connected."""
        if self._writer is None:
            raise GuestError("no serial line to the guest")
        self._writer.write(text.encode() + b"\n")

    async def reply(self, command: str, timeout_seconds: float) -> dict[str, Any]:
        """Return the next reply to `command`. Raises: GuestError: none, or `ok` is false."""
        message = await self._next(command, timeout_seconds)
        if not message.get("ok"):
            raise GuestError(f"guest: {command}: {message.get('error', 'refused')}")
        return message

    async def _next(self, command: str, timeout_seconds: float) -> dict[str, Any]:
        """Return the next reply to `command`, whatever it says; those to other commands are dropped."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while (message := await self._replies.get())["reply"] != command:
                    pass
        except TimeoutError as error:
            raise GuestError(f"guest: no reply to {command!r} in {timeout_seconds:g} s") from error
        return message

    async def catch_up(self) -> None:
        """Wait until the guest has answered every command; unexpected replies are dropped.

        A command that is sent again because no reply came in time may have two, and the second would be taken
        for that to a later command of the same name.

        Raises: GuestError: it does not answer.
        """
        self.send(_NO_COMMAND)
        await self._next(_NO_COMMAND, PATIENCE_SECONDS)

    async def command(self, text: str, timeout_seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Run one command and return its reply. Raises: GuestError."""
        self.send(text)
        return await self.reply(text.split(" ", 1)[0], timeout_seconds)

    async def start_load(
        self,
        spec: Workload,
        page_bytes: int = DEFAULT_PAGE_BYTES,
        *,
        via: Transport = "mmio",
        tick_ms: int = 0,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Have the guest carry out `spec` on every device it has, each with a seed of its own.

        Args: page_bytes: of the devices; `status` reports it.
              tick_ms: interval of heartbeats, 0 for none.
              part: offset and bytes of device memory to write to, None for all of it.
        Raises: GuestError: it refuses. ConfigError: the guest cannot do such a load.
        """
        for line in program_lines(spec, page_bytes):
            await self.command(f"program {line}")
        where = "" if part is None else f" offset={part[0]} bytes={part[1]}"
        await self.command(f"start via={via} tick_ms={tick_ms}{where}")

    async def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
