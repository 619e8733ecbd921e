"""The key-value store of the author's guide in real QEMU: used through its BARs, migrated, used again."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from labkit import PATIENT
from serverkit import PATIENCE_SECONDS

from vfu_dev.client.digest import resumed_digest, saved_digest
from vfu_dev.vm.own_device import ask_own_device
from vfu_dev.vm.qemu import FIRST_SLOT, Qemu, QemuOptions
from vfu_dev.vm.qtest import QtestClient
from vfu_dev.vm.qtest_device import PCI_BASE_ADDRESS_0, PCI_COMMAND
from vfu_dev.vm.servers import DeviceServer, ServerOptions

KVSTORE = Path(__file__).parents[2] / "docs" / "examples" / "kvstore.py"
BAR0, BAR2, BAR4 = 0xE000_0000, 0xE010_0000, 0xE000_1000
KEY, VALUE, COMMAND, STATUS, COUNT = 0x00, 0x08, 0x10, 0x14, 0x18
PUT, GET = 1, 2
KEYS = 300


class Host:
    """A server of the example and the QEMU that it is attached to."""

    def __init__(self, name: str, qemu: Path, library: Path, sockets: Path, logs: Path) -> None:
        own = ask_own_device(f"{KVSTORE}:KeyValueStore")
        self.server = DeviceServer(name, sockets, logs, ServerOptions(own=own, library=library))
        options = QemuOptions(binary=qemu, ram_bytes=16 << 20, incoming=name == "destination", extra=PATIENT)
        self.qemu = Qemu(name, sockets, logs, options, [self.server.socket])
        self.guest = QtestClient(self.qemu.qtest_socket)

    async def __aenter__(self) -> Host:
        await self.server.start()
        await self.qemu.start()
        await self.guest.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.guest.close()
        await self.qemu.stop()
        await self.server.stop()

    async def program(self) -> None:
        """Give the BARs addresses, as firmware does."""
        assert await self.guest.config_read(FIRST_SLOT, 0) == 0x4B56_4656
        for index, address in ((0, BAR0), (2, BAR2), (3, 0), (4, BAR4)):
            await self.guest.config_write(FIRST_SLOT, PCI_BASE_ADDRESS_0 + 4 * index, address)
        await self.guest.config_write(FIRST_SLOT, PCI_COMMAND, 0x6)

    async def do(self, command: int, key: int, value: int = 0) -> int:
        """Carry out a command as a driver would; return its status."""
        await self.guest.write(8, BAR0 + KEY, key)
        await self.guest.write(8, BAR0 + VALUE, value)
        await self.guest.write(4, BAR0 + COMMAND, command)
        return await self.guest.read(4, BAR0 + STATUS)


def test_qemu_uses_and_migrates_the_example(qemu: Path, library: Path, tmp_path: Path) -> None:
    """A device of 56 lines, written without a word about migration, moves with what its guest stored."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfud-")))
            sides = [Host(name, qemu, library, sockets, tmp_path) for name in ("source", "destination")]
            source, destination = [await stack.enter_async_context(side) for side in sides]
            await source.program()
            for key in range(KEYS):
                assert await source.do(PUT, key << 7 | 1, key * key) == 0
            uri = f"unix:{sockets / 'migration.sock'}"
            capabilities = [{"capability": name, "state": True} for name in ("events", "return-path")]
            for side in (source, destination):
                await side.qemu.execute("migrate-set-capabilities", capabilities=capabilities)
            await destination.qemu.execute("migrate-incoming", uri=uri)
            await source.qemu.execute("migrate", uri=uri)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while (found := (await source.qemu.migration()).get("status")) != "completed":
                    assert found not in ("failed", "cancelled")
                    await asyncio.sleep(0.05)
                while await destination.qemu.run_state() != "running":
                    await asyncio.sleep(0.05)
            assert await destination.guest.read(8, BAR0 + COUNT) == KEYS
            for key in range(KEYS):
                assert await destination.do(GET, key << 7 | 1) == 0
                assert await destination.guest.read(8, BAR0 + VALUE) == key * key
            assert await destination.do(GET, 2) == 1
            assert await destination.guest.read(8, BAR2 + 32 * 129 + 8) == 129
            saved, resumed = await source.server.status(), await destination.server.status()
            assert saved_digest(saved)
            assert saved_digest(saved) == resumed_digest(resumed)
            assert "PRE_COPY" in [change["to"] for change in saved["transitions"]]
            assert saved["save"]["precopy_bytes"] > 0

    asyncio.run(scenario())
