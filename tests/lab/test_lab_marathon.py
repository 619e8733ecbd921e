"""One running VM moved fifty times in a row, with everything going on that a real device does."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from labkit import MIB

from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.guest import LinuxGuest
from vfu_dev.workload import Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

MOVES = 50
# The driver changes from one kind of interrupt to the next after so many moves.
MODES, MOVES_EACH = ("msix", "msi", "intx"), 17


async def change_interrupts(guest: LinuxGuest, mode: str) -> None:
    """Have the driver use another kind of interrupt, and the DMA load begin anew with it."""
    await stop_dma(guest)
    vectors = (await guest.command(f"irq mode={mode}"))["vectors"]
    # INTx has 32 causes, the device raises four of them.
    await guest.command(f"dma rate={8 * MIB} vector={min(vectors, 4) - 1} offset={2 * MIB} bytes={2 * MIB}")


async def stop_dma(guest: LinuxGuest) -> None:
    """Stop the DMA load; each of its batches came with one interrupt, and the device raised no other."""
    stopped = await guest.command("dma-stop")
    assert (stopped["errors"], stopped["mismatched_bytes"], stopped["lost_interrupts"]) == (0, 0, 0)
    counted = await guest.command("irqs")
    assert stopped["interrupts"] == stopped["batches"] == counted["total"], (stopped, counted)


async def check(lab: Lab, guest: LinuxGuest) -> None:
    """Have the guest look at all that it can know, while its loads run; then go on."""
    stamps = await guest.command("writer-check again=1")
    assert (stamps["wrong_bytes"], stamps["status"]) == (0, 1), (lab.moves, stamps)
    assert stamps["stamps"] > 0
    batches = await guest.command("dma-status")
    assert (batches["errors"], batches["lost_interrupts"], batches["lost_statuses"]) == (0, 0, 0), (
        lab.moves,
        batches,
    )
    found = await guest.command("verify")
    assert found["verified"], f"move {lab.moves}: {found}"
    assert found["generation"] == lab.moves


def test_fifty_moves_without_a_mismatch(options: Options, in_lab: InLab, guest_image: Path) -> None:
    """Back and forth under MMIO, descriptors, interrupts of each kind and stamps: all agree every time."""

    async def scenario(lab: Lab) -> None:
        guest = lab.guest
        assert isinstance(guest, LinuxGuest)
        await guest.command(f"writer buffer={MIB} rate={16 * MIB}")
        # MMIO and descriptors have half of the device's memory each: journals of their own.
        await guest.start_on(Workload("hotset", rate_pages=1000, write_bytes=24), (0, 2 * MIB))
        before = {"writes": 0, "batches": 0}
        for number in range(MOVES):
            if number % MOVES_EACH == 0:
                await change_interrupts(guest, MODES[number // MOVES_EACH])
                before["batches"] = 0
            result = await lab.move()
            judge(result, pre_copy=True, verified=False)
            assert result.problems == [], (lab.moves, result.problems)
            await check(lab, guest)
            now = {
                "writes": (await guest.command("status"))["writes"],
                "batches": (await guest.command("dma-status"))["batches"],
            }
            assert all(now[key] > before[key] for key in now), (lab.moves, before, now)
            before = now
            await lab.turn_around()
        await stop_dma(guest)
        await guest.stop()
        found = await guest.verify()
        assert found.verified
        assert found.generation == MOVES
        assert found.readback_checks > 0

    chosen = options(
        guest_image=guest_image,
        memory_bytes=4 * MIB,
        load=Workload("idle"),
        max_bandwidth=1 << 30,
        switchover_bandwidth=64 * MIB,
        downtime_limit_ms=300,
        warmup_seconds=0.0,
    )
    in_lab(chosen, scenario)
