"""Reading device memory back without a CPU: by the device's DMA engine, or 8 bytes at a time."""

from __future__ import annotations

import asyncio
import random
import time

import numpy as np

from vfu_dev.device.reference.layout import CTRL_START, Op, Status
from vfu_dev.errors import LabError
from vfu_dev.vm.guest import GuestError, GuestResult, VerifyReporter
from vfu_dev.vm.qtest import QtestClient
from vfu_dev.vm.qtest_device import PCI_COMMAND, PCI_COMMAND_ENABLED, QtestDevice

# Guest RAM that the device copies to: the upper part of what a machine without a system has.
BUFFER_ADDRESS = 16 << 20
BUFFER_BYTES = 8 << 20
# By MMIO each 8 bytes are a message to the device's server, some 100 us: a block takes a second.
MMIO_BLOCK_BYTES = 64 << 10
# Words read by MMIO beside a read-back by DMA: what the CPU's way would find wrong everywhere shows in these.
SAMPLE_WORDS = 256
WORDS_A_BATCH = 64
# A copy takes some 0.1 ms for each 256 KiB; a server that does not get on with it at all is a fault.
COPY_TIMEOUT_SECONDS = 60.0


class ReadBack:
    """Compares the devices' memory with their journals; counts into `result`. Raises: GuestError: cannot."""

    def __init__(
        self,
        client: QtestClient,
        devices: list[QtestDevice],
        result: GuestResult,
        reporter: VerifyReporter | None,
    ) -> None:
        self._client = client
        self._devices = devices
        self._result = result
        self._reporter = reporter
        self._total = sum(device.size_bytes for device in devices)

    async def by_mmio(self) -> None:
        """Read all memory 8 bytes at a time, as a CPU does."""
        for device in self._devices:
            for offset in range(0, device.size_bytes, MMIO_BLOCK_BYTES):
                count = min(MMIO_BLOCK_BYTES, device.size_bytes - offset)
                self._compare(device, offset, await self._read(device.bar2 + offset, count))

    async def by_dma(self) -> None:
        """Have the devices copy all memory to guest RAM; some words are read by MMIO first."""
        for device in self._devices:
            await self._sample(device)
            await self._enable(device)
            for offset in range(0, device.size_bytes, BUFFER_BYTES):
                count = min(BUFFER_BYTES, device.size_bytes - offset)
                await self._copy(device, offset, count)
                self._compare(device, offset, await self._read(BUFFER_ADDRESS, count))

    async def _sample(self, device: QtestDevice) -> None:
        """Read words of random places, and both ends of the last writes, by MMIO."""
        last = device.size_bytes // 8 - 1
        chosen = set(random.sample(range(last + 1), min(SAMPLE_WORDS, last + 1)))
        for offset, count in device.recent:
            chosen |= {offset // 8, (offset + count - 1) // 8}
        words = sorted(word for word in chosen if word <= last)
        for first in range(0, len(words), WORDS_A_BATCH):
            some = words[first : first + WORDS_A_BATCH]
            try:
                replies = await self._client.batch([f"readq {device.bar2 + 8 * word:#x}" for word in some])
            except LabError as error:
                raise GuestError(f"verify: {error}") from error
            for word, reply in zip(some, replies, strict=True):
                found = int(reply, 0).to_bytes(8, "little")
                if found != device.journal.read(8 * word, 8).tobytes():
                    self._result.sampled_wrong_words += 1
                    self._note(device, 8 * word, found)
        self._result.sampled_words += len(words)

    async def _enable(self, device: QtestDevice) -> None:
        """Enable the device as a driver does: QEMU 10.2 resets one that refused to stop; the VM runs on."""
        try:
            await self._client.config_write(device.slot, PCI_COMMAND, PCI_COMMAND_ENABLED)
        except LabError as error:
            raise GuestError(f"verify: {error}") from error

    async def _copy(self, device: QtestDevice, offset: int, count: int) -> None:
        """Copy a part of device memory to the buffer in guest RAM, by a descriptor in registers."""
        commands = [
            f"writel {device.register('desc_op'):#x} {Op.TO_GUEST:d}",
            f"writel {device.register('desc_flags'):#x} 0",
            f"writeq {device.register('desc_address'):#x} {BUFFER_ADDRESS:#x}",
            f"writeq {device.register('desc_offset'):#x} {offset:#x}",
            f"writeq {device.register('desc_length'):#x} {count:#x}",
            # A copy that never happened must not find the right bytes of the one before.
            f"memset {BUFFER_ADDRESS:#x} {count:#x} 0xa5",
            f"writel {device.register('desc_ctrl'):#x} {CTRL_START}",
        ]
        try:
            await self._client.batch(commands)
            deadline = time.monotonic() + COPY_TIMEOUT_SECONDS
            status = await self._client.read(4, device.register("desc_status"))
            while status == Status.IDLE and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
                status = await self._client.read(4, device.register("desc_status"))
        except LabError as error:
            raise GuestError(f"verify: {error}") from error
        if status != Status.DONE:
            raise GuestError(
                f"verify: the device's DMA engine did not copy {count} bytes at {offset:#x}: status {status} "
                "(vfu-dev docs device); --verify mmio does not need it"
            )

    async def _read(self, address: int, count: int) -> bytes:
        try:
            return await self._client.read_block(address, count)
        except LabError as error:
            raise GuestError(f"verify: {error}") from error

    def _compare(self, device: QtestDevice, offset: int, block: bytes) -> None:
        result = self._result
        expected = device.journal.read(offset, len(block))
        found = np.frombuffer(block, np.uint8)
        if not np.array_equal(found.view(np.uint64), expected.view(np.uint64)):
            wrong = np.flatnonzero(found != expected)
            result.mismatched_bytes += int(wrong.size)
            at = int(wrong[0]) // 8 * 8
            self._note(device, offset + at, block[at : at + 8])
        result.compared_bytes += len(block)
        if self._reporter is not None:
            self._reporter(result.compared_bytes, self._total)

    def _note(self, device: QtestDevice, offset: int, found: bytes) -> None:
        if self._result.first_mismatch is None:
            self._result.first_mismatch = {
                "device": self._devices.index(device),
                "offset": offset,
                "expected": device.journal.read(offset, 8)[::-1].tobytes().hex(),
                "found": found[::-1].hex(),
            }
