"""One running Linux VM, moved from one QEMU to the next: where it goes, and what is asserted of each move.

The guest has two devices. It writes to both and checks what it reads, and both write to its memory all the
time (their writers, docs/device.md): digests would not see guest memory that was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from labkit import (
    KIB,
    MIB,
    PRELOAD_PATIENT,
    begin_and_stay,
    dirtying,
    let_go,
    let_ram_go,
    wait_back_at_source,
)
from serverkit import PATIENCE_SECONDS
from versionkit import ACKED, OURS, Evidence, Row, shows

from vfu_dev.builds import artifact
from vfu_dev.builds.qemu_binary import find_qemu
from vfu_dev.builds.qemu_packages import SUITES
from vfu_dev.errors import BuildError
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions, QemuChoice
from vfu_dev.lab.result import MigrationResult
from vfu_dev.qemu_events import TRACE_PATTERNS
from vfu_dev.vm.guest import LinuxGuest
from vfu_dev.vm.qemu import RamKind

T = TypeVar("T")

OLD, NEW = (suite.name for suite in SUITES)
# The table's name of a QEMU -> the lab's.
QEMUS = {"10.0": OLD, "10.2": "unpatched", OURS: "patched", "11.1": NEW}
DEVICES = 2
BUFFER_BYTES = MIB
BOTH = ("multifd", "switchover-ack")


@dataclass(frozen=True)
class Place:
    """A host: its QEMU, how that gets the devices, and what the guest's RAM is there."""

    qemu: str
    iommu: str
    ram: RamKind = "shared"
    # The preloaded library does not log what it writes itself: a fault that a test has to notice.
    forgets: bool = False

    @property
    def row(self) -> Row:
        """Where it is in the table of versions."""
        return Row(self.qemu, "vfio-pci", self.iommu)

    @property
    def choice(self) -> QemuChoice:
        """What the lab calls it. Skips the test if that QEMU is not there."""
        try:
            return QemuChoice(find_qemu(QEMUS[self.qemu]).path, "vfio-pci", self.iommu)
        except BuildError as error:
            pytest.skip(str(error))

    def __str__(self) -> str:
        return f"{self.qemu}/{self.iommu}/{self.ram}" + ("/forgets" if self.forgets else "")


@dataclass(frozen=True)
class Leg:
    """One move.

    Attributes:
        capabilities: QEMU's that are on.
        features: of the table, beside those that every leg shows.
        lost: whose log is off, `server` or `library`: then guest memory is lost, and the check has to see it.
    """

    source: Place
    destination: Place
    capabilities: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    lost: str = ""

    def marks(self) -> list[pytest.MarkDecorator]:
        """Return what a test of this leg claims: nothing, if it is one that loses memory."""
        if self.lost:
            return []
        found = [shows(self.source.row, "PRE_COPY", "P2P", *self.features)]
        if self.source.row.release != self.destination.row.release:
            found += [shows(self.source.row, "to another"), shows(self.destination.row, "from another")]
        return found

    def __str__(self) -> str:
        return f"{self.source}-{self.destination}"


def with_both(source: Place, destination: Place) -> Leg:
    """Return a leg with multifd and switchover-ack."""
    return Leg(source, destination, BOTH, ("multifd", "ack"))


def without(whose: str, source: Place, destination: Place) -> Leg:
    """Return a leg on which the log of DMA of `whose` is off."""
    return Leg(source, destination, lost=whose)


def as_parameters(legs: list[Leg]) -> list[Any]:
    """Return the legs for `parametrize`, with what each claims."""
    return [
        pytest.param(leg, id=f"{number}-{leg}", marks=leg.marks()) for number, leg in enumerate(legs, start=1)
    ]


@dataclass
class Vm:
    """The lab with the running VM."""

    runner: asyncio.Runner
    lab: Lab
    place: Place
    # The destination that is waiting; none once the VM has moved there.
    waiting: Place | None
    run: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.runner.run

    @property
    def guest(self) -> LinuxGuest:
        """The guest, which follows the VM."""
        assert isinstance(self.lab.guest, LinuxGuest)
        return self.lab.guest

    async def start(self) -> None:
        """Boot the guest; its load starts, and both devices' writers."""
        await self.lab.start()
        assert await self.guest.command(f"writer buffer={BUFFER_BYTES} rate={4 * MIB}")

    def configure(self, *capabilities: str) -> None:
        """Set these capabilities of the next move, and no others of those that the tests set."""
        wanted = {name: name in capabilities for name in BOTH}
        self.lab.options = replace(self.lab.options, capabilities=tuple(wanted.items()))

    async def face(self, source: Place, destination: Place, *, fresh: bool = False) -> None:
        """Have the VM at `source`, and a destination waiting at `destination`; a `fresh` one if need be."""
        if self.place != source:
            await self.face(self.place, source)
            self.configure()
            await self.lab.move()
            self._arrived()
        if self.waiting == destination and not fresh:
            return
        forgets = (("VFU_DEV_PRELOAD_FAULT", "forget-writes"),) if destination.forgets else ()
        environment = (*PRELOAD_PATIENT, *forgets)
        self.lab.options = replace(self.lab.options, ram=destination.ram, qemu_environment=environment)
        if self.waiting is None:
            await self.lab.turn_around(keep_logs=True, choice=destination.choice)
        else:
            await self.lab.replace_destination(choice=destination.choice)
        self.waiting = destination

    def _arrived(self) -> None:
        assert self.waiting is not None
        self.place, self.waiting = self.waiting, None

    async def travel(self, leg: Leg, evidence: Evidence) -> MigrationResult:
        """Move the VM; devices and guest memory are whole, or as much of it is lost as the leg says."""
        await self.face(leg.source, leg.destination)
        self.configure(*leg.capabilities)
        if not leg.lost:
            result = await self.lab.move()
        else:
            for server in self.lab.source.servers:
                await server.command("dma-log", enabled=leg.lost != "server")
            result = await self.in_two_passes()
        await self.check(result, evidence, lost=bool(leg.lost))
        return result

    async def in_two_passes(self) -> MigrationResult:
        """Move the VM, all of whose memory is sent before the devices write to all of it once more."""
        lab, result = self.lab, MigrationResult()
        await begin_and_stay(lab)

        def twice(row: dict[str, Any]) -> bool:
            return int(row["qemu"].get("ram", {}).get("dirty-sync-count", 0)) > 1

        await let_ram_go(lab)
        await lab.wait_for(twice, "the second pass over guest memory")
        written = await self.dma_writes()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.dma_writes() < written + 2 * DEVICES * BUFFER_BYTES:
                await asyncio.sleep(0.01)
        await let_go(lab)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        await lab.follow()
        await lab.collect(result)
        return result

    async def dma_writes(self) -> int:
        """Return how many bytes the devices have written to guest memory."""
        counted = [
            (await server.status())["counters"]["dma_written_bytes"] for server in self.lab.source.servers
        ]
        return sum(counted)

    async def check(
        self, result: MigrationResult, evidence: Evidence, *, lost: bool = False, file: Path | None = None
    ) -> None:
        """Check what moved; the VM is at the destination now."""
        judge(result, pre_copy=True, verified=False)
        assert result.problems == []
        assert [device.digest_match for device in result.devices] == [True] * DEVICES
        stamps = await self.guest.command("writer-check again=1")
        assert stamps["status"] == 1, stamps
        assert stamps["stamps"] > stamps["pages"]
        assert (stamps["wrong_bytes"] > 0) == lost, stamps
        if not lost:
            evidence.of_move(self.lab, result, file)
        self._arrived()

    async def through_file(self, path: Path, evidence: Evidence) -> None:
        """Move the VM by a file, which the destination reads when it is complete."""
        lab, result = self.lab, MigrationResult()
        await lab.configure(return_path=False)
        await lab.begin(f"file:{path}")
        assert (await lab.wait_final())["status"] == "completed"
        await lab.destination.qemu.execute("migrate-incoming", uri=f"file:{path}")
        await lab.wait_running(lab.destination.qemu, PATIENCE_SECONDS)
        await lab.follow()
        await lab.collect(result)
        await self.check(result, evidence, file=path)

    async def fails(self) -> dict[str, Any]:
        """Let the migration go on, and return what QEMU says in the end; servers may be gone."""
        await let_go(self.lab)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (reply := await self.lab.source.qemu.migration())["status"] not in ("failed", "cancelled"):
                assert reply["status"] != "completed", reply
                await asyncio.sleep(0.05)
        return reply

    async def goes_on(self) -> None:
        """After a migration that failed: the VM runs at the source, and every device of it does."""
        await wait_back_at_source(self.lab)
        ticks = len(self.guest.events)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.guest.events) == ticks:
                await asyncio.sleep(0.02)
        await self.lab.forget()

    async def read_back(self) -> None:
        """Have the guest compare every byte of both devices, and each read-back on the way."""
        await self.guest.stop()
        found = await self.guest.verify()
        errors = (found.mismatched_bytes, found.scratch_errors, found.readback_errors)
        assert (found.verified, *errors) == (True, 0, 0, 0)
        assert found.compared_bytes == DEVICES * self.lab.options.memory_bytes
        assert found.writes > 0
        assert found.readback_checks > 0


@contextmanager
def vm_in(folder: Path, first: Leg, library: Path, guest_image: Path) -> Iterator[Vm]:
    """Boot the VM where the first leg begins, with its destination waiting."""
    artifact("vfio-preload")
    source, destination = first.source, first.destination
    options = MigrateOptions(
        qemu=source.choice.binary,
        front_end=source.choice.front_end,
        iommu=source.iommu,
        qemu_destination=destination.choice.binary,
        front_end_destination=destination.choice.front_end,
        iommu_destination=destination.iommu,
        qemu_environment=PRELOAD_PATIENT,
        ram=source.ram,
        library=library,
        guest_image=guest_image,
        memory_bytes=2 * MIB,
        devices=DEVICES,
        load=dirtying(256 * KIB),
        max_bandwidth=64 * MIB,
        switchover_bandwidth=8 * MIB,  # 2.4 MiB in 300 ms: less than both devices have
        warmup_seconds=0.2,
        settle_seconds=0.2,
        timeout_seconds=PATIENCE_SECONDS,
        traces=(*TRACE_PATTERNS, ACKED),
    )
    assert source.ram == destination.ram, "the first two hosts have the same kind of RAM"
    with asyncio.Runner() as runner:
        lab = Lab(options, folder / "logs")
        try:
            found = Vm(runner, lab, source, destination)
            runner.run(found.start())
            yield found
        finally:
            runner.run(lab.close())
