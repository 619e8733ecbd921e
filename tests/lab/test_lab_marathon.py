"""One running VM moved fifty times in a row, with everything going on that a real device does.

The long run moves it a hundred times between the same two servers, and looks at what these hold.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from growthkit import FIGURES, RINGS_BYTES, Growth
from labkit import MIB

from vfu_dev.lab.host import Host
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.guest import LinuxGuest
from vfu_dev.workload import Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

MOVES, LONG_RUN_MOVES = 50, 100
# The driver changes from one kind of interrupt to the next after this number of moves.
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


async def turn_around(lab: Lab, growth: Growth) -> None:
    """Prepare the way back, to a fresh QEMU with the old source's server. Then sample what both hold."""
    old, lab.source = lab.source, lab.destination
    await old.qemu.stop()
    fresh = Host(old.name, lab.sockets, lab.logs, lab.options, incoming=True, choice=old.choice)
    fresh.servers = old.servers
    lab.destination = fresh
    await fresh.qemu.start()
    await lab.forget()
    lab.roles_since = time.time()
    if lab.moves % 2:
        return  # a server holds more as destination: each is sampled in the same role
    for server in (*lab.source.servers, *lab.destination.servers):
        growth.processes[server.name] = (server.process.pid, server.process.log)
    growth.sample(lab.moves)


async def move_on(lab: Lab, moves: int, after_each: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Move the VM back and forth, with everything going on, and check all of it each time."""
    guest = lab.guest
    assert isinstance(guest, LinuxGuest)
    await guest.command(f"writer buffer={MIB} rate={16 * MIB}")
    # MMIO and descriptors have half of the device's memory each: journals of their own.
    await guest.start_on(Workload("hotset", rate_pages=1000, write_bytes=24), (0, 2 * MIB))
    before = {"writes": 0, "batches": 0}
    for number in range(moves):
        if number % MOVES_EACH == 0:
            await change_interrupts(guest, MODES[number // MOVES_EACH % len(MODES)])
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
        await after_each()
    await stop_dma(guest)
    await guest.stop()
    found = await guest.verify()
    assert found.verified
    assert found.generation == moves
    assert found.readback_checks > 0


@pytest.fixture
def chosen(options: Options, guest_image: Path) -> MigrateOptions:
    """A device of 4 MiB in a Linux guest."""
    return options(
        guest_image=guest_image,
        memory_bytes=4 * MIB,
        load=Workload("idle"),
        max_bandwidth=1 << 30,
        switchover_bandwidth=64 * MIB,
        downtime_limit_ms=300,
        warmup_seconds=0.0,
    )


def test_fifty_moves_without_a_mismatch(chosen: MigrateOptions, in_lab: InLab) -> None:
    """Back and forth under MMIO, descriptors, interrupts of each kind and stamps: all agree every time."""
    in_lab(chosen, lambda lab: move_on(lab, MOVES, lab.turn_around))


@pytest.mark.soak
def test_a_hundred_moves_without_a_mismatch_and_without_growth(chosen: MigrateOptions, in_lab: InLab) -> None:
    """The same between two servers that stay, and have one QEMU after the other."""
    growth = Growth({}, filling_bytes=RINGS_BYTES)

    async def scenario(lab: Lab) -> None:
        await move_on(lab, LONG_RUN_MOVES, lambda: turn_around(lab, growth))
        for server in (*lab.source.servers, *lab.destination.servers):
            totals = (await server.command("figures"))["snapshot"]["totals"]
            ended = {name: count for name, count in totals["saves"].items() if count}
            assert ended == {"completed": LONG_RUN_MOVES // 2}, totals

    in_lab(chosen, scenario)
    if (where := os.environ.get(FIGURES)) is not None:
        Path(where, "with-qemu.json").write_text(json.dumps(growth.to_json()))
    assert growth.problems() == []
