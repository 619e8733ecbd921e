"""The guest of `--guest none`: the lab itself programs the device and writes to it, through qtest."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vfu_dev.device.reference.layout import DEVICE_ID, REGISTER_ID, VENDOR_ID
from vfu_dev.vm.guest import Guest, GuestError, GuestResult, VerifyReporter, Via
from vfu_dev.vm.qemu import FIRST_SLOT, Qemu
from vfu_dev.vm.qtest import QtestClient, QtestError
from vfu_dev.vm.qtest_device import PCI_VENDOR_ID, QtestDevice, Windows
from vfu_dev.vm.qtest_readback import ReadBack
from vfu_dev.workload import Pacer, Phase, Program, Run, Workload, Writes, contents
from vfu_dev.workload.spec import MAX_SEED

DEVICE_IDS = DEVICE_ID << 16 | VENDOR_ID  # as the two read in configuration space

# One qtest batch: long enough to amortise the round trip, short enough to notice a stopped VM.
BATCH_WRITES = 64
BATCH_BYTES = 64 << 10
# Of a write, this much at its end is read back to see whether it has arrived.
TAIL_BYTES = 8


def with_seed(load: Workload, index: int) -> Workload:
    """Return what device `index` gets of `load`: the same with a seed of its own, as vfud-load does it."""
    phases = tuple(Phase(phase.seconds, with_seed(phase.load, index)) for phase in load.phases)
    return replace(load, seed=(load.seed + index) & MAX_SEED, phases=phases)


class QtestGuest(Guest):
    """Writes to the devices of a QEMU that runs no CPU, exactly as a driver would.

    Args: drives: whether this is a reference device, whose memory and registers are known here. Of any
          other it plays the firmware alone.
    """

    kind = "none"

    def __init__(self, drives: bool = True) -> None:
        self.drives = drives
        self.client: QtestClient | None = None
        self.devices: list[QtestDevice] = []
        self._qemu: Qemu | None = None
        self._task: asyncio.Task[None] | None = None
        self._result = GuestResult(kind=self.kind)
        self._pacer: Pacer | None = None
        self._stopping = False
        self._elapsed = 0.0
        self._last_write = 0.0
        self._left_ns = 0
        self._written_bytes = 0

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
        client = await self.attach(source)
        self.devices = []
        for slot in range(FIRST_SLOT, 31):
            ids = await client.config_read(slot, PCI_VENDOR_ID)
            if ids == (DEVICE_IDS if self.drives else ids) and ids & 0xFFFF != 0xFFFF:
                self.devices.append(QtestDevice(slot))
        if not self.devices:
            raise GuestError("no device on PCI bus 0")
        await self.program_bars()
        for device in self.devices if self.drives else []:
            await self._probe(device)

    async def program_bars(self) -> None:
        """Assign addresses and enable memory decoding, as firmware does after power-on or reset."""
        assert self.client is not None
        windows = Windows()
        for device in self.devices:
            device.place(await windows.place(self.client, device.slot))

    async def _probe(self, device: QtestDevice) -> None:
        assert self.client is not None
        found = await self.client.read(4, device.register("id"))
        if found != REGISTER_ID:
            raise GuestError(f"device in slot {device.slot}: ID register is {found:#x}, not {REGISTER_ID:#x}")
        device.size_bytes = await self.client.read(8, device.register("memsize"))
        device.fill = await self.client.read(8, device.register("fill"))
        device.page_bytes = await self.client.read(4, device.register("page_size"))

    async def start(self, load: Workload) -> None:
        """Write in a task of its own until `stop`, or until the VM is stopped by a migration.

        A load that runs ends first: two writers would share a journal, and `stop` would end one of them.
        """
        if not self.drives:
            return
        await self._join()
        for index, device in enumerate(self.devices):
            device.program = Program(with_seed(load, index), device.size_bytes, device.page_bytes)
            device.scratch = load.seed % (1 << 32) << 32 | device.slot
            assert self.client is not None
            await self.client.write(8, device.register("scratch"), device.scratch)
            self._result.asked_rate_bytes = device.program.asked_rate_bytes
        self._pacer = None
        if not load.is_idle:
            self._task = asyncio.create_task(self._run())

    async def write_pages(self, count: int, load: Workload) -> None:
        """Carry out the first `count` writes of `load` on every device at once."""
        for index, device in enumerate(self.devices):
            (writes,) = Program(with_seed(load, index), device.size_bytes, device.page_bytes).writes
            assert writes is not None
            for first in range(0, count, BATCH_WRITES):
                await self._write(device, writes, first, min(BATCH_WRITES, count - first))

    async def _run(self) -> None:
        started = self._last_write = time.monotonic()
        program = self.devices[0].program
        assert program is not None
        if self._pacer is None:
            self._pacer = program.pacer(time.monotonic_ns())
        else:
            self._pacer.hold(time.monotonic_ns() - self._left_ns)
        try:
            while not self._stopping:
                runs = self._pacer.take(time.monotonic_ns(), BATCH_WRITES)
                for run in runs:
                    if not await self._carry_out(run):
                        return
                if not runs:
                    await asyncio.sleep(0.002)
        except (QtestError, ConnectionError):
            return  # QEMU is gone; verify() will say so
        finally:
            self._elapsed += time.monotonic() - started
            self._left_ns = time.monotonic_ns()
            self._result.missed_writes = self._pacer.missed * len(self.devices)

    async def _carry_out(self, run: Run) -> bool:
        """Do the writes of `run` to every device; False when the VM turned out to be stopped."""
        for device in self.devices:
            assert device.program is not None
            writes = device.program.writes[run.phase]
            assert writes is not None
            first = run.first
            while first < run.first + run.count:
                most = max(1, BATCH_BYTES // int(writes.lengths(first, 1)[0]))
                count = min(most, BATCH_WRITES, run.first + run.count - first)
                if not await self._write(device, writes, first, count):
                    return False
                first += count
        return True

    async def _write(self, device: QtestDevice, writes: Writes, first: int, count: int) -> bool:
        """Do `count` writes; return False when the VM turned out to be stopped.

        A stopped device refuses writes, and the writer gets no sign of it. So after each batch QEMU is asked
        whether the VM was stopped within it, perhaps to run on at once. If it was, each write is read back to
        learn which of them arrived. If not, the end of the batch is: the device serves accesses in order.
        """
        assert self.client is not None
        offsets = writes.offsets(first, count).tolist()
        lengths = writes.lengths(first, count).tolist()
        data = [contents(writes.seed, first + n, 1, length)[0] for n, length in enumerate(lengths)]
        commands = [
            f"b64write {device.bar2 + offset:#x} {len(row):#x} {base64.b64encode(row.tobytes()).decode()}"
            for offset, row in zip(offsets, data, strict=True)
        ]
        tail = min(TAIL_BYTES, lengths[-1])
        last = device.bar2 + offsets[-1] + lengths[-1] - tail
        before, wall = time.monotonic(), time.time()
        replies = await self.client.batch([*commands, f"b64read {last:#x} {tail:#x}"])
        after = time.monotonic()
        self._result.max_gap_ms = max(self._result.max_gap_ms, (after - self._last_write) * 1000)
        self._result.max_access_ms = max(self._result.max_access_ms, (after - before) * 1000 / (count + 1))
        self._last_write = after
        assert self._qemu is not None
        # QEMU reports a stop before it answers what comes later, so one within the batch is known by now. One
        # that began before the batch ended within it, or has not ended.
        state = await self._qemu.run_state()
        changes = [e for e in self._qemu.events if e["event"] in ("STOP", "RESUME") and e["time"] >= wall]
        if state != "running" or changes:
            await self._take_stock(device, offsets, data)
            return state == "running"
        if base64.b64decode(replies[-1]) != data[-1][-tail:].tobytes():
            self._result.readback_errors += 1
        for offset, row in zip(offsets, data, strict=True):
            device.journal.write(offset, row)
        device.recent.extend(zip(offsets, lengths, strict=True))
        self._result.writes += count
        self._written_bytes += sum(lengths)
        self._result.readback_checks += 1
        return True

    async def _take_stock(
        self, device: QtestDevice, offsets: list[int], data: list[npt.NDArray[np.uint8]]
    ) -> None:
        """Enter into the journal what of these writes has arrived: aligned words that read as written."""
        assert self.client is not None
        for offset, row in zip(offsets, data, strict=True):
            device.recent.append((offset, len(row)))
            found = np.frombuffer(await self.client.read_block(device.bar2 + offset, len(row)), np.uint8)
            same = found == row
            for start, end in pairwise([0, *range(8 - offset % 8, len(row), 8), len(row)]):
                if same[start:end].all():
                    device.journal.write(offset + start, row[start:end])
            if same.all():
                self._result.writes += 1
                self._written_bytes += len(row)

    async def follow(self, destination: Qemu) -> None:
        """Go on writing on the destination, where QEMU has restored the BARs."""
        loaded = self._task is not None
        await self._join()
        gap_from = self._last_write
        await self.attach(destination)
        for device in self.devices:
            assert self.client is not None
            if loaded:
                await self.client.read(8, device.bar2)
                self._result.outage_ms = (time.monotonic() - gap_from) * 1000
        if loaded:
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

    def figures(self) -> GuestResult:
        """Return the figures of the load."""
        if self._elapsed:
            rate = self._written_bytes / max(len(self.devices), 1) / self._elapsed
            self._result.reached_rate_bytes = rate
        return self._result

    async def verify(self, via: Via = "auto", reporter: VerifyReporter | None = None) -> GuestResult:
        """Read all device memory back and compare it with the journal; `auto` is `dma`."""
        assert self.client is not None
        result, started = self.figures(), time.monotonic()
        result.verify_via = "mmio" if via == "mmio" else "dma"
        read_back = ReadBack(self.client, self.devices, result, reporter)
        await (read_back.by_mmio() if via == "mmio" else read_back.by_dma())
        for device in self.devices:
            found = await self.client.read(8, device.register("scratch"))
            result.scratch_errors += device.scratch is not None and found != device.scratch
            result.generation = await self.client.read(8, device.register("generation"))
        result.verify_seconds = time.monotonic() - started
        result.judge()
        return result

    async def close(self) -> None:
        """End the writer and the connection."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self.client is not None:
            self.client.close()
