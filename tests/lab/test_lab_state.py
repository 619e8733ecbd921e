"""State of every kind behind a real QEMU: mapped and trapped memories, `--initial`, new initial data."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labkit import MIB, NOTHING_FITS, begin_and_stay, dirtying, let_go
from versionkit import ACKED, OURS, Evidence, Row, shows

from vfu_dev.device.reference.layout import REGISTERS
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.qemu_events import TRACE_PATTERNS
from vfu_dev.vm.guest import Guest, GuestResult, LinuxGuest, VerifyReporter, Via
from vfu_dev.vm.qemu import FIRST_SLOT, Qemu
from vfu_dev.vm.qtest import QtestClient
from vfu_dev.vm.qtest_device import PCI_BASE_ADDRESS_0, PCI_COMMAND
from vfu_dev.workload import Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

GIB = 1 << 30
PAGE = 4096
# Where the test puts the BARs: above 4 GiB, where two of 1 GiB have room.
BAR_ADDRESS = {0: 0xE000_0000, 1: 0xE000_1000, 2: 0x20_0000_0000, 4: 0x28_0000_0000}
BATCH = 64


class TwoMemoryGuest(Guest):
    """Plays the guest of a device with a memory behind BAR2 and another behind BAR4.

    Mapped memory is written without the server's help, so no read-back tells that the VM was stopped: whoever
    uses this stops the writer before.
    """

    kind = "none"

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes
        self.journal: dict[int, dict[int, int]] = {bar: {} for bar in sizes}
        self.client: QtestClient
        self.writes = 0
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._random = np.random.default_rng(11)

    async def ready(self, source: Qemu) -> None:
        """Give the BARs addresses."""
        await self._attach(source)
        for bar, address in BAR_ADDRESS.items():
            await self.client.config_write(FIRST_SLOT, PCI_BASE_ADDRESS_0 + 4 * bar, address & 0xFFFF_FFFF)
            if bar in self.sizes:
                await self.client.config_write(FIRST_SLOT, PCI_BASE_ADDRESS_0 + 4 * bar + 4, address >> 32)
        await self.client.config_write(FIRST_SLOT, PCI_COMMAND, 0x6)

    async def _attach(self, qemu: Qemu) -> None:
        self.client = QtestClient(qemu.qtest_socket)
        await self.client.connect()

    async def start(self, load: Workload) -> None:
        """Write to both memories and the scratch register until `stop`."""
        await self.client.write(8, BAR_ADDRESS[0] + REGISTERS["scratch"].offset, 0x5CA7C4)
        self._stopping = False
        if not load.is_idle:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stopping:
            for bar in self.sizes:
                await self.write_once(bar)
            await asyncio.sleep(0.005)

    async def write_once(self, bar: int) -> None:
        """Write one word in each of `BATCH` pages anywhere in the memory."""
        pages = self._random.integers(0, self.sizes[bar] // PAGE, BATCH)
        offsets = (pages * PAGE + 8 * self._random.integers(0, PAGE // 8, BATCH)).tolist()
        values = self._random.integers(1, 1 << 63, BATCH).tolist()
        commands = [f"writeq {BAR_ADDRESS[bar] + o:#x} {v:#x}" for o, v in zip(offsets, values, strict=True)]
        await self.client.batch(commands)
        self.journal[bar].update(zip(offsets, values, strict=True))
        self.writes += BATCH

    async def stop(self) -> None:
        """Stop writing between two batches."""
        self._stopping = True
        if self._task is not None:
            await self._task
            self._task = None

    async def follow(self, destination: Qemu) -> None:
        """Talk to the destination."""
        await self.stop()
        self.client.close()
        await self._attach(destination)

    def figures(self) -> GuestResult:
        """Return how much was written."""
        return GuestResult(kind=self.kind, writes=self.writes)

    async def verify(self, via: Via = "mmio", reporter: VerifyReporter | None = None) -> GuestResult:
        """Read back the words that were written last, 2000 of each memory, and the registers."""
        result = self.figures()
        for bar, journal in self.journal.items():
            some = list(journal.items())[-2000:]
            replies = await self.client.batch([f"readq {BAR_ADDRESS[bar] + offset:#x}" for offset, _ in some])
            wrong = [o for (o, value), reply in zip(some, replies, strict=True) if int(reply, 0) != value]
            result.mismatched_bytes += 8 * len(wrong)
            result.compared_bytes += 8 * len(some)
        result.scratch_errors = int(
            await self.client.read(8, BAR_ADDRESS[0] + REGISTERS["scratch"].offset) != 0x5CA7C4
        )
        result.generation = await self.client.read(8, BAR_ADDRESS[0] + REGISTERS["generation"].offset)
        result.verified = not (result.mismatched_bytes or result.scratch_errors)
        return result

    async def close(self) -> None:
        """End the writer and the connection."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(AttributeError):
            self.client.close()


def run_two_memories(
    options: MigrateOptions, folder: Path, scenario: Callable[[Lab], Coroutine[Any, Any, MigrationResult]]
) -> MigrationResult:
    """Run `scenario` with a guest that knows both memories."""

    async def whole() -> MigrationResult:
        async with Lab(options, folder / "logs") as lab:
            lab.guest = TwoMemoryGuest({2: GIB, 4: GIB})
            await lab.start()
            return await scenario(lab)

    return asyncio.run(whole())


@pytest.mark.parametrize("mapped", ["BAR2", "BAR4"])
def test_two_gigabytes_in_two_memories_move_under_load(options: Options, tmp_path: Path, mapped: str) -> None:
    """One memory mapped and one trapped, then the other way round; the writer stops before the VM does."""

    async def scenario(lab: Lab) -> MigrationResult:
        guest = lab.guest
        assert isinstance(guest, TwoMemoryGuest)
        server = lab.source.servers[0]
        await lab.configure()
        await lab.begin(await lab.listen())
        began = guest.writes
        await lab.wait_for(
            lambda row: row["source"][0].get("initial_bytes") == 0 and row["source"][0]["passes"] >= 2,
            "the initial data is out, and a pass of what changed",
        )
        assert guest.writes > began
        await guest.stop()
        # The link was too slow for the load; without it, nothing is.
        await lab.source.qemu.execute(
            "migrate-set-parameters", downtime_limit=2000, avail_switchover_bandwidth=MIB
        )
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        counters = (await server.status())["counters"]
        # What went to the mapped memory was never seen by the server.
        trapped = guest.writes // 2
        assert trapped <= counters["region_writes"] < trapped + 100
        await guest.follow(lab.destination.qemu)
        result = MigrationResult(guest=await guest.verify())
        await lab.collect(result)
        return result

    first, second = ("mmap", "trap") if mapped == "BAR2" else ("trap", "mmap")
    chosen = options(
        memory_bytes=GIB,
        server_extra=("--access", first, "--memory", f"second=1G,bar=4,access={second}"),
        load=dirtying(MIB),
        max_bandwidth=4 * GIB,
        switchover_bandwidth=1000 * NOTHING_FITS,  # for 1 ms
        downtime_limit_ms=1,
    )
    result = run_two_memories(chosen, tmp_path, scenario)
    device = result.devices[0]
    assert device.digest_match
    assert device.initial_bytes > 2 * GIB
    assert device.precopy_bytes > 2 * GIB
    assert device.save is not None
    assert device.save["audited"]
    assert device.save["pages_resent"] > 0
    assert result.guest is not None
    assert result.guest.verified
    assert result.guest.generation == 1
    assert result.qemu.vfio_bytes == device.precopy_bytes + device.stop_copy_bytes


def test_a_linux_guest_writes_to_mapped_memory(options: Options, in_lab: InLab, guest_image: Path) -> None:
    """The guest's CPU writes until the very moment it is stopped, and nobody is told of a single write."""

    async def scenario(lab: Lab) -> MigrationResult:
        server = lab.source.servers[0]
        assert isinstance(lab.guest, LinuxGuest)
        before = (await server.status())["counters"]["region_writes"]
        await begin_and_stay(lab)
        await lab.wait_for(lambda row: row["source"][0]["passes"] >= 2, "what changed is sent too")
        written = (await lab.guest.command("status"))["writes"]
        while (await lab.guest.command("status"))["writes"] <= written + 1000:
            await asyncio.sleep(0.01)
        await let_go(lab)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        after = (await lab.source.servers[0].status())["counters"]["region_writes"]
        await lab.guest.follow(lab.destination.qemu)
        await lab.guest.stop()
        result = MigrationResult(guest=await lab.guest.verify())
        await lab.collect(result)
        assert after - before < 50
        return result

    result = in_lab(
        options(
            guest_image=guest_image,
            memory_bytes=8 * MIB,
            server_extra=("--access", "mmap"),
            load=dirtying(4 * MIB),
            max_bandwidth=64 * MIB,
            switchover_bandwidth=16 * MIB,
        ),
        scenario,
    )
    device = result.devices[0]
    assert device.digest_match
    assert device.save is not None
    assert (device.save["status"], device.save["audited"]) == ("completed", True)
    assert device.save["pages_resent"] > 0
    assert result.guest is not None
    assert result.guest.verified
    assert result.guest.writes > 1000
    assert result.guest.mismatched_bytes == 0


def test_initial_is_what_the_operator_says(options: Options, in_lab: InLab) -> None:
    """`--initial 1M` of 4 MiB: QEMU's trace starts with 1 MiB initial, and the rest dirty."""

    async def scenario(lab: Lab) -> MigrationResult:
        assert (await lab.migrate())["status"] == "completed"
        result = MigrationResult()
        await lab.collect(result)
        return result

    result = in_lab(
        options(
            memory_bytes=4 * MIB,
            max_bandwidth=4 * MIB,
            switchover_ack=True,
            load=dirtying(0),
            server_extra=("--initial", "1M"),
        ),
        scenario,
    )
    rows = [e["values"] for e in result.qemu.trace_source if e["event"] == "vfio_state_pending_exact"]
    rows += [e["values"] for e in result.qemu.trace_source if e["event"] == "vfio_save_iterate"]
    initial, dirty = max(row["initial"] for row in rows), max(row["dirty"] for row in rows)
    framing = MIB // 50  # indices, record headers, schema
    assert 0 < initial <= MIB + framing
    assert 2 * MIB < dirty < 3 * MIB + 3 * framing
    assert MIB < result.devices[0].initial_bytes < MIB + framing
    assert result.devices[0].digest_match


@pytest.mark.parametrize(
    "reinit",
    [False, pytest.param(True, marks=shows(Row(OURS, "vfio-user-pci"), "PRE_COPY", "ack", "REINIT"))],
)
def test_switchover_waits_for_initial_data_that_appears_late(
    options: Options, in_lab: InLab, evidence: Evidence, reinit: bool
) -> None:
    """With switchover-ack: all initial data first, and again when the device finds some meanwhile."""

    async def scenario(lab: Lab) -> MigrationResult:
        guest = lab.guest
        await lab.configure()
        await lab.begin(await lab.listen())
        await lab.wait_for(
            lambda row: row["source"][0].get("initial_bytes") == 0 and row["source"][0]["passes"] >= 2,
            "the initial data is out",
        )
        if reinit:
            (device,) = guest.devices  # type: ignore[attr-defined]
            await guest.client.write(4, device.register("reinit"), 512)  # type: ignore[attr-defined]
        await guest.stop()
        await lab.source.qemu.execute(
            "migrate-set-parameters",
            downtime_limit=2000,
            avail_switchover_bandwidth=GIB,  # all of it would fit into the downtime
            max_bandwidth=8 * MIB,
        )
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        result = MigrationResult()
        await lab.collect(result)
        evidence.of_move(lab, result)
        return result

    result = in_lab(
        options(
            traces=(*TRACE_PATTERNS, ACKED),
            memory_bytes=2 * MIB,
            max_bandwidth=MIB,
            switchover_bandwidth=1000 * NOTHING_FITS,  # for 1 ms
            downtime_limit_ms=1,
            switchover_ack=True,
            load=dirtying(2 * MIB),
        ),
        scenario,
    )
    assert "switchover-ack" in result.qemu.capabilities
    device = result.devices[0]
    assert device.digest_match
    assert device.save is not None
    assert device.save["reinits"] == int(reinit)
    trace = result.qemu.trace_source
    told = [index for index, event in enumerate(trace) if event["event"] == "vfio_precopy_reinit"]
    assert bool(told) == reinit
    if reinit:
        assert trace[told[0]]["values"]["initial"] >= 2 * MIB
        # Data that would have fitted into the downtime was sent before it: the new initial data.
        later = [e["values"] for e in trace[told[0] :] if e["event"] == "vfio_save_iterate"]
        assert later[-1]["initial"] == 0
        assert device.precopy_bytes >= device.initial_bytes + 2 * MIB
