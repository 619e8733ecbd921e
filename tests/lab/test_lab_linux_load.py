"""Loads from the Linux guest, and the device's own DMA into it, while a real QEMU moves both."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, begin_and_stay, let_go
from serverkit import PATIENCE_SECONDS

from vfu_dev.errors import ConfigError
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.guest import GuestError, LinuxGuest
from vfu_dev.workload import Burst, Phase, Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def linux(options: Options, guest_image: Path) -> Callable[..., MigrateOptions]:
    """Make options for a Linux guest that is idle until it is told otherwise."""

    def make(**changes: Any) -> MigrateOptions:
        values = {
            "guest_image": guest_image,
            "memory_bytes": 256 * KIB,
            "load": Workload("idle"),
            "max_bandwidth": 1 << 30,
            "switchover_bandwidth": 64 * MIB,
            "warmup_seconds": 0.0,
        }
        return options(**{**values, **changes})

    return make


def guest_of(lab: Lab) -> LinuxGuest:
    assert isinstance(lab.guest, LinuxGuest)
    return lab.guest


async def until_written(guest: LinuxGuest, writes: int) -> dict[str, Any]:
    """Wait until the running load has made that number of writes."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (status := await guest.command("status"))["writes"] < writes:
            await asyncio.sleep(0.01)
    return status


async def until_batches(guest: LinuxGuest, batches: int) -> None:
    """Wait until the DMA load has completed that number of batches."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await guest.command("dma-status"))["batches"] < batches:
            await asyncio.sleep(0.01)


def recording(path: Path) -> str:
    rows = [f"{n / 1000},{n * 37 % (200 * KIB)},{1 + n * 7 % 5000}" for n in range(250)]
    path.write_text("\n".join(["time,offset,length", *rows, "0.3,0,0", ""]))
    return str(path)


def test_loads_of_every_kind_arrive(linux: Options, in_lab: InLab, tmp_path: Path) -> None:
    """Writes of 1 byte to 64 KiB, by MMIO and by DMA: the device holds what the guest wrote, and no more."""
    loads = [
        Workload("uniform", rate_pages=2000, write_bytes=1, seed=1),
        Workload("zipf", rate_pages=2000, write_bytes=3, seed=2),
        Workload("hotset", rate_bytes=4e5, write_bytes=1000, seed=3, burst=Burst(0.3, 0.05)),
        Workload("sequential", rate_bytes=4e5, write_bytes=64 * KIB, seed=4),
        Workload("phases", phases=(Phase(0.05, Workload(rate_pages=3000)), Phase(0.01, Workload("idle")))),
        Workload("trace", trace=recording(tmp_path / "trace.csv"), seed=6),
    ]

    async def scenario(lab: Lab) -> None:
        guest = guest_of(lab)
        for load in loads:
            for guest.via in ("mmio", "dma"):
                await guest.start(load)
                await until_written(guest, 5 if load.write_bytes > 4096 else 150)
                assert (await guest.command("stop"))["dma_errors"] == 0
                found = await guest.command("verify via=dma")
                assert found["verified"], (load.describe(), guest.via, found)
        found = await guest.command("verify via=mmio")
        assert found["verified"], found
        assert (found["via"], found["compared_bytes"]) == ("mmio", 256 * KIB)
        # The same checks see what somebody else wrote.
        await lab.source.servers[0].command("load", load=Workload(rate_pages=2000, seed=9).to_dict())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await guest.command("verify via=dma"))["mismatched_bytes"] < 100:
                await asyncio.sleep(0.01)
        await lab.source.servers[0].command("load", load=None)
        by_dma = await guest.command("verify via=dma")
        by_cpu = await guest.command("verify via=mmio")
        assert not by_cpu["verified"]
        for key in ("mismatched_bytes", "first_mismatch"):
            assert by_cpu[key] == by_dma[key]

    in_lab(linux(), scenario)


REFUSED = {
    "start dirty_rate=256p patern=uniform": "patern=uniform: expected KEY=VALUE, and of keys one of via,",
    "start": "nothing to write: say dirty_rate=256p, or a program first",
    "start dirty_rate=256p via=pio": "via: expected mmio|dma",
    "dma rate=fast": "rate: expected a whole number or a size",
    "verify via=cpu": "via: expected auto|mmio|dma",
    "irq mode=msi-x": "mode: expected none|intx|msi|msix",
    "rescan now": "now: expected KEY=VALUE, and of keys none",
    "dmesg match=a match=b": "match: given twice",
    'program phase pattern="uniform"': "pattern: expected idle|sequential",
}


def test_what_is_typed_is_judged_and_rates_are_as_people_write_them(linux: Options, in_lab: InLab) -> None:
    """What a command does not know is refused by name; what it takes is done, and the reply says so."""

    async def scenario(lab: Lab) -> None:
        guest = guest_of(lab)
        for text, said in REFUSED.items():
            with pytest.raises(GuestError, match=re.escape(said)):
                await guest.command(text)
        started = await guest.command("start dirty_rate=2M write_size=64")
        assert started["writes_per_second"] == 512
        await until_written(guest, 20)
        assert (await guest.command("stop"))["written_bytes"] % 64 == 0
        # A refused start has not changed the program.
        assert (await guest.command("start"))["writes_per_second"] == 512
        await guest.command("stop")
        assert (await guest.command("verify"))["verified"]
        assert "error" not in await guest.command("writer buffer=256K rate=8M")
        assert (await guest.command("rescan"))["left"] == ""
        assert (await guest.command("writer-check"))["wrong_bytes"] == 0

    in_lab(linux(), scenario)


def test_a_load_keeps_its_rate_or_says_so(linux: Options, in_lab: InLab) -> None:
    """What the machine carries is carried out in full; what it does not is counted as missed."""

    async def scenario(lab: Lab) -> None:
        guest = guest_of(lab)
        await guest.start(Workload(rate_pages=400, write_bytes=16))
        await until_written(guest, 200)
        kept = await guest.command("stop")
        due = 400 * kept["elapsed_ns"] / 1e9
        # Behind by no more than a generator may be, 0.25 s; and never ahead.
        assert due - 100 - 1 <= kept["writes"] + kept["missed_writes"] <= due
        assert kept["written_bytes"] == 16 * kept["writes"]
        assert (await guest.verify()).asked_rate_bytes == 6400
        # Each write is a message to the server: ten million a second are not possible.
        await guest.start(Workload(rate_pages=10_000_000))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (await guest.command("status"))["missed_writes"]:
                await asyncio.sleep(0.01)
        await guest.stop()
        lost = await guest.verify()
        assert lost.verified
        assert lost.missed_writes > 0
        assert lost.reached_rate_bytes < 0.5 * lost.asked_rate_bytes == 40e6
        with pytest.raises(GuestError, match="larger than the memory"):
            await guest.start(Workload(rate_pages=1, write_bytes=512 * KIB))
        for part in ((0, 260 * KIB), (260 * KIB, (1 << 64) - 4 * KIB), (KIB, 4 * KIB), (0, 0)):
            with pytest.raises(GuestError, match="not a part of the memory"):
                await guest.start_on(Workload(rate_pages=1), part)
        with pytest.raises(ConfigError, match="out of the range of the guest program"):
            await guest.start(Workload(rate_pages=1 << 50, burst=Burst(1e-14, 86400.0)))

    in_lab(linux(), scenario)


def test_mapped_memory_is_read_as_memory(linux: Options, in_lab: InLab) -> None:
    """Where no access is trapped the guest reads 16 MiB itself, before a move under load and after it."""

    async def scenario(lab: Lab) -> None:
        guest = guest_of(lab)
        await guest.start(Workload("uniform", rate_pages=2000, write_bytes=100))
        await until_written(guest, 300)
        assert (await guest.command("verify"))["via"] == "mmio"
        await lab.move()
        await until_written(guest, 600)
        await guest.stop()
        found = await guest.command("verify")
        assert found["verified"], found
        assert (found["via"], found["compared_bytes"], found["generation"]) == ("mmio", 16 * MIB, 1)

    in_lab(linux(access="mmap", memory_bytes=16 * MIB), scenario)


def test_what_the_device_writes_into_a_linux_guest_arrives(linux: Options, in_lab: InLab) -> None:
    """Descriptors of every kind, each batch with its interrupt, and stamps: all is there after the move."""

    async def scenario(lab: Lab) -> None:
        guest = guest_of(lab)
        with pytest.raises(GuestError, match="taken by irq"):
            await guest.command(f"dma rate={8 * MIB} vector=1")
        assert (await guest.command("irq mode=msix"))["vectors"] == 4
        await guest.command(f"writer buffer={MIB} rate={16 * MIB}")
        await guest.command(f"dma rate={8 * MIB} vector=1")
        await until_batches(guest, 5)
        await lab.move()
        await until_batches(guest, (await guest.command("dma-status"))["batches"] + 5)
        stamps, batches = await guest.command("writer-check"), await guest.command("dma-stop")
        assert (stamps["wrong_bytes"], stamps["status"]) == (0, 1)
        assert stamps["stamps"] > stamps["pages"]
        assert (batches["errors"], batches["mismatched_bytes"], batches["lost_interrupts"]) == (0, 0, 0)
        assert batches["interrupts"] == batches["batches"]
        assert (await guest.command("verify"))["verified"]

    in_lab(linux(memory_bytes=MIB), scenario)


def test_a_linux_guest_notices_that_dma_is_not_logged(linux: Options, in_lab: InLab) -> None:
    """The check of the stamps passes with dirty logging, fails without, and passes with it again."""

    async def dma_bytes(lab: Lab) -> int:
        return int((await lab.source.servers[0].status())["counters"]["dma_written_bytes"])

    async def wrong_bytes(lab: Lab, *, logged: bool) -> int:
        guest = guest_of(lab)
        await lab.source.servers[0].command("dma-log", enabled=logged)
        await guest.command(f"writer buffer={MIB} rate={16 * MIB}")
        await begin_and_stay(lab)
        # RAM has been sent, and each page of the buffer is stamped once more: what nobody notices is lost.
        await lab.wait_for(lambda row: row["qemu"].get("ram", {}).get("dirty-sync-count", 0) > 1, "a pass")
        stamped = await dma_bytes(lab)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await dma_bytes(lab) <= stamped + MIB:
                await asyncio.sleep(0.01)
        await let_go(lab)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        await lab.follow()
        stamps = await guest.command("writer-check")
        assert (stamps["status"], stamps["pages"]) == (1, 256)
        assert stamps["stamps"] > 0
        await lab.turn_around()
        return int(stamps["wrong_bytes"])

    async def scenario(lab: Lab) -> None:
        assert await wrong_bytes(lab, logged=True) == 0
        assert await wrong_bytes(lab, logged=False) > 0
        assert await wrong_bytes(lab, logged=True) == 0

    in_lab(linux(), scenario)
