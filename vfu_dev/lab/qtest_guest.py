"""The guest of `--guest none`: the lab itself programs the device and writes to it, through qtest."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import LabError
from vfu_dev.lab.guest import PAGE_BYTES, Guest, GuestError, LoadPlan, VerifyProgress
from vfu_dev.lab.qemu import FIRST_SLOT, Qemu
from vfu_dev.lab.qtest import QtestClient, QtestError
from vfu_dev.lab.result import GuestResult

# <linux/pci_regs.h>
PCI_VENDOR_ID = 0x00
PCI_COMMAND = 0x04
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4
PCI_BASE_ADDRESS_0 = 0x10

# q35: above the ECAM window, below the I/O APIC; libqos uses the same start.
BAR_WINDOW = 0xE000_0000
BAR_WINDOW_END = 0xFEB0_0000

# Reference device (vfu_dev/device): identification and BAR0 registers.
DEVICE_IDS = 0x4455 << 16 | 0x4656
REG_ID = 0x00
REG_MEMSIZE = 0x08
REG_FILL = 0x10
REG_GENERATION = 0x28
REG_SCRATCH = 0x100
ID_VALUE = 0x4455_4656

GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
# One qtest batch: long enough to amortise the round trip, short enough to notice a stopped VM.
BATCH_WRITES = 64
VERIFY_BLOCK_BYTES = 256 << 10


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the splitmix64 finaliser of each word, shape as given."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return value ^ (value >> np.uint64(31))


def fill_words(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """Return the reference device's initial content as `count` little-endian words; zeros for seed 0."""
    if seed == 0:
        return np.zeros(count, np.uint64)
    return mix(np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


class _Device:
    """One device as its driver sees it: addresses, and what its memory must hold."""

    def __init__(self, slot: int, bar0: int, bar2: int, size_bytes: int, fill: int) -> None:
        self.slot = slot
        self.bar0 = bar0
        self.bar2 = bar2
        self.size_bytes = size_bytes
        self.journal = fill_words(fill, size_bytes // 8)
        self.scratch: int | None = None
        self.cursor = 0


class QtestGuest(Guest):
    """Writes to the devices of a QEMU that runs no CPU, exactly as a driver would."""

    kind = "none"

    def __init__(self) -> None:
        self.client: QtestClient | None = None
        self.devices: list[_Device] = []
        self._qemu: Qemu | None = None
        self._task: asyncio.Task[None] | None = None
        self._result = GuestResult(kind=self.kind)
        self._plan = LoadPlan(rate_bytes=0)
        self._random = np.random.default_rng(0)
        self._sequence = 0
        self._stopping = False
        self._elapsed = 0.0
        self._last_write = 0.0

    async def attach(self, qemu: Qemu) -> QtestClient:
        """Connect to the qtest socket of `qemu`."""
        if self.client is not None:
            self.client.close()
        self._qemu = qemu
        self.client = QtestClient(qemu.qtest_socket)
        await self.client.connect()
        return self.client

    async def ready(self, source: Qemu) -> None:
        """Find the devices in the configuration space of bus 0 and give their BARs addresses."""
        await self.attach(source)
        self.devices = []
        for slot in range(FIRST_SLOT, 31):
            assert self.client is not None
            if await self.client.config_read(slot, PCI_VENDOR_ID) == DEVICE_IDS:
                self.devices.append(await self._probe(slot, len(self.devices)))
        if not self.devices:
            raise GuestError("no device on PCI bus 0")

    async def _bar_size(self, slot: int, index: int) -> int:
        assert self.client is not None
        offset = PCI_BASE_ADDRESS_0 + 4 * index
        await self.client.config_write(slot, offset, 0xFFFF_FFFF)
        mask = await self.client.config_read(slot, offset) & ~0xF
        return (~mask & 0xFFFF_FFFF) + 1 if mask else 0

    async def program_bars(self) -> None:
        """Assign addresses and enable memory decoding, as firmware does after power-on or reset."""
        assert self.client is not None
        address = BAR_WINDOW
        for device in self.devices:
            sizes = [await self._bar_size(device.slot, index) for index in (0, 2, 4)]
            for index, size in sorted(zip((0, 2, 4), sizes, strict=True), key=lambda pair: -pair[1]):
                address = -(-address // size) * size
                if address + size > BAR_WINDOW_END:
                    raise GuestError(f"no room for a BAR of {size} bytes below 4 GiB; use --guest linux")
                await self.client.config_write(device.slot, PCI_BASE_ADDRESS_0 + 4 * index, address)
                if index == 2:
                    await self.client.config_write(device.slot, PCI_BASE_ADDRESS_0 + 12, 0)
                    device.bar2 = address
                elif index == 0:
                    device.bar0 = address
                address += size
            command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER
            await self.client.config_write(device.slot, PCI_COMMAND, command)

    async def _probe(self, slot: int, count: int) -> _Device:
        assert self.client is not None
        device = _Device(slot, 0, 0, 8, 0)
        self.devices.append(device)
        try:
            await self.program_bars()
        finally:
            self.devices.pop()
        found = await self.client.read(4, device.bar0 + REG_ID)
        if found != ID_VALUE:
            raise GuestError(f"device in slot {slot}: ID register is {found:#x}, not {ID_VALUE:#x}")
        size = await self.client.read(8, device.bar0 + REG_MEMSIZE)
        fill = await self.client.read(8, device.bar0 + REG_FILL)
        return _Device(slot, device.bar0, device.bar2, size, fill)

    async def start(self, plan: LoadPlan) -> None:
        """Write in a task of its own until `stop`, or until the VM is stopped by a migration."""
        self._plan = plan
        self._random = np.random.default_rng(plan.seed)
        for device in self.devices:
            device.scratch = plan.seed << 32 | device.slot
            assert self.client is not None
            await self.client.write(8, device.bar0 + REG_SCRATCH, device.scratch)
        if plan.rate_bytes > 0:
            self._task = asyncio.create_task(self._run())

    def _choose(self, device: _Device, count: int) -> npt.NDArray[np.int64]:
        pages = device.size_bytes // PAGE_BYTES
        if self._plan.pattern == "sequential":
            chosen = (device.cursor + np.arange(count)) % pages
            device.cursor = int(chosen[-1]) + 1
        elif self._plan.pattern == "hotset":
            hot = max(1, int(pages * self._plan.hot_fraction))
            cold = np.logical_and(self._random.random(count) >= self._plan.hot_share, hot < pages)
            chosen = self._random.integers(0, hot, count)
            chosen[cold] = self._random.integers(hot, pages, int(cold.sum())) if hot < pages else 0
        else:
            chosen = self._random.integers(0, pages, count)
        words: npt.NDArray[np.int64] = chosen * (PAGE_BYTES // 8)
        words += self._random.integers(0, PAGE_BYTES // 8, count)
        return words

    async def write_pages(self, count: int) -> None:
        """Write a word to each of `count` pages of every device, as the plan's pattern chooses, at once."""
        for device in self.devices:
            for start in range(0, count, BATCH_WRITES):
                await self._write(device, min(BATCH_WRITES, count - start))

    async def _run(self) -> None:
        started = self._last_write = time.monotonic()
        done = 0
        try:
            while not self._stopping:
                due = int((time.monotonic() - started) * self._plan.writes_per_second)
                count = min(BATCH_WRITES, due - done)
                if count <= 0:
                    await asyncio.sleep(0.002)
                    continue
                for device in self.devices:
                    if not await self._write(device, count):
                        return
                done += count
        except (QtestError, ConnectionError):
            return  # QEMU is gone; verify() will say so
        finally:
            self._elapsed += time.monotonic() - started

    async def _write(self, device: _Device, count: int) -> bool:
        """Write `count` words; return False when the VM turned out to be stopped.

        A stopped device refuses writes, and nobody tells the writer. So the last word of each batch is read
        back: if it is there, everything before it is (the device serves accesses in order). If it is not, the
        VM was stopped within this batch, and each word is read to learn which write was the guest's last.
        """
        assert self.client is not None
        words = self._choose(device, count)
        numbers = np.arange(self._sequence, self._sequence + count, dtype=np.uint64)
        values = mix(numbers + np.uint64(self._plan.seed) * GOLDEN) ^ words.astype(np.uint64)
        self._sequence += count
        commands = [
            f"writeq {device.bar2 + 8 * word:#x} {value:#x}"
            for word, value in zip(words.tolist(), values.tolist(), strict=True)
        ]
        before, wall = time.monotonic(), time.time()
        replies = await self.client.batch([*commands, f"readq {device.bar2 + 8 * int(words[-1]):#x}"])
        after = time.monotonic()
        self._result.max_gap_ms = max(self._result.max_gap_ms, (after - self._last_write) * 1000)
        self._result.max_access_ms = max(self._result.max_access_ms, (after - before) * 1000 / (count + 1))
        self._last_write = after
        if int(replies[-1], 0) == int(values[-1]):
            device.journal[words] = values
            self._result.writes += count
            self._result.readback_checks += 1
            return True
        assert self._qemu is not None
        state = await self._qemu.run_state()
        stops = [event for event in self._qemu.events if event["event"] == "STOP" and event["time"] >= wall]
        if state == "running" and not stops:
            self._result.readback_checks += 1
            self._result.readback_errors += 1
            device.journal[words] = values
            return True
        for word, value in zip(words.tolist(), values.tolist(), strict=True):
            if await self.client.read(8, device.bar2 + 8 * word) == value:
                device.journal[word] = value
                self._result.writes += 1
        return state == "running"

    async def follow(self, destination: Qemu) -> None:
        """Go on writing on the destination, where QEMU has restored the BARs."""
        await self._join()
        gap_from = self._last_write
        await self.attach(destination)
        for device in self.devices:
            assert self.client is not None
            if self._plan.rate_bytes > 0 and await self._write(device, 1):
                self._result.outage_ms = (time.monotonic() - gap_from) * 1000
        if self._plan.rate_bytes > 0:
            self._task = asyncio.create_task(self._run())

    async def _join(self) -> None:
        """End the writer between two batches: a cut one leaves writes in doubt and replies on the wire."""
        if self._task is not None:
            self._stopping = True
            await self._task
            self._task = None
            self._stopping = False

    async def stop(self) -> None:
        """Stop writing between two batches."""
        await self._join()

    async def verify(self, progress: VerifyProgress | None = None) -> GuestResult:
        """Read all device memory back and compare it with the journal."""
        assert self.client is not None
        result = self._result
        started = time.monotonic()
        total = sum(device.size_bytes for device in self.devices)
        for index, device in enumerate(self.devices):
            for offset in range(0, device.size_bytes, VERIFY_BLOCK_BYTES):
                count = min(VERIFY_BLOCK_BYTES, device.size_bytes - offset)
                try:
                    block = await self.client.read_block(device.bar2 + offset, count)
                except LabError as error:
                    raise GuestError(f"verify: {error}") from error
                expected = device.journal[offset // 8 : (offset + count) // 8].view(np.uint8)
                wrong = np.flatnonzero(np.frombuffer(block, np.uint8) != expected)
                result.compared_bytes += count
                if wrong.size and result.first_mismatch is None:
                    at = int(wrong[0]) // 8 * 8
                    result.first_mismatch = {
                        "device": index,
                        "offset": offset + at,
                        "expected": expected[at : at + 8][::-1].tobytes().hex(),
                        "found": block[at : at + 8][::-1].hex(),
                    }
                result.mismatched_bytes += int(wrong.size)
                if progress is not None:
                    progress(result.compared_bytes, total)
            found = await self.client.read(8, device.bar0 + REG_SCRATCH)
            result.scratch_errors += device.scratch is not None and found != device.scratch
            result.generation = await self.client.read(8, device.bar0 + REG_GENERATION)
        result.verify_seconds = time.monotonic() - started
        result.asked_rate_bytes = self._plan.rate_bytes
        if self._elapsed:
            result.reached_rate_bytes = result.writes * PAGE_BYTES / max(len(self.devices), 1) / self._elapsed
        result.verified = not (result.mismatched_bytes or result.readback_errors or result.scratch_errors)
        return result

    async def close(self) -> None:
        """End the writer and the connection."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self.client is not None:
            self.client.close()
