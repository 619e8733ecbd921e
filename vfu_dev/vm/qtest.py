"""QEMU's qtest protocol: memory and port accesses without a running guest.

One text command a line, one reply line, in order (`docs/devel/testing/qtest.rst` in the QEMU tree). With
`-accel qtest` no CPU runs, so what these functions do is all that the machine ever sees.
"""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

from vfu_dev.errors import LabError

# Intel configuration mechanism 1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2).
CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC


class QtestError(LabError):
    """QEMU refused a qtest command or is gone. Attributes: `sent`, `reply`."""

    def __init__(self, sent: str, reply: str) -> None:
        super().__init__(f"qtest: {sent!r}: {reply or 'connection closed'}")
        self.sent = sent
        self.reply = reply


class QtestClient:
    """A connection to one QEMU's qtest socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = asyncio.Lock()

    async def connect(self) -> None:
        """Connect to QEMU's socket. Raises: OSError."""
        self._reader, self._writer = await asyncio.open_unix_connection(str(self.path), limit=1 << 26)

    def close(self) -> None:
        """Drop the connection; QEMU goes on."""
        if self._writer is not None:
            self._writer.close()

    async def batch(self, commands: list[str]) -> list[str]:
        """Send `commands` in one go and return what each replied after `OK`.

        Raises: QtestError: QEMU refused one or closed the connection.
        """
        assert self._reader is not None
        assert self._writer is not None
        replies = []
        async with self._lock:
            try:
                self._writer.write(("\n".join(commands) + "\n").encode())
                await self._writer.drain()
                for command in commands:
                    line = await self._reader.readline()
                    while line.startswith(b"IRQ "):  # asynchronous notice, not a reply
                        line = await self._reader.readline()
                    text = line.decode().strip()
                    if not text.startswith("OK"):
                        raise QtestError(command[:60], text)
                    replies.append(text[2:].strip())
            except ConnectionError as error:
                raise QtestError(commands[0][:60], str(error)) from error
        return replies

    async def read(self, width: int, address: int) -> int:
        """Read 1, 2, 4 or 8 bytes of guest physical memory (little-endian value)."""
        letter = {1: "b", 2: "w", 4: "l", 8: "q"}[width]
        return int((await self.batch([f"read{letter} {address:#x}"]))[0], 0)

    async def write(self, width: int, address: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes of guest physical memory."""
        letter = {1: "b", 2: "w", 4: "l", 8: "q"}[width]
        await self.batch([f"write{letter} {address:#x} {value:#x}"])

    async def read_block(self, address: int, count: int) -> bytes:
        """Read `count` bytes; QEMU splits as the memory region asks (8 bytes for a trapped BAR)."""
        return base64.b64decode((await self.batch([f"b64read {address:#x} {count:#x}"]))[0])

    async def write_block(self, address: int, data: bytes) -> None:
        """Write `data`; QEMU splits the access as the memory region asks."""
        text = base64.b64encode(data).decode()
        await self.batch([f"b64write {address:#x} {len(data):#x} {text}"])

    async def config_read(self, slot: int, offset: int) -> int:
        """Read a 32-bit word of the configuration space of bus 0, `slot`, function 0."""
        select = f"outl {CONFIG_ADDRESS:#x} {0x80000000 | slot << 11 | offset & 0xFC:#x}"
        return int((await self.batch([select, f"inl {CONFIG_DATA:#x}"]))[1], 0)

    async def config_write(self, slot: int, offset: int, value: int) -> None:
        """Write a 32-bit word of the configuration space of bus 0, `slot`, function 0."""
        select = f"outl {CONFIG_ADDRESS:#x} {0x80000000 | slot << 11 | offset & 0xFC:#x}"
        await self.batch([select, f"outl {CONFIG_DATA:#x} {value:#x}"])
