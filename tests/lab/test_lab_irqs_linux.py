"""A Linux kernel takes the device's interrupts in each of the three ways while its VM moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from labkit import KIB, MIB, begin_and_stay, dirtying, let_go
from serverkit import PATIENCE_SECONDS

from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.guest import LinuxGuest

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

WAIT_MS = round(PATIENCE_SECONDS * 1000)  # for one interrupt
EACH = 25  # raised one after the other, before, during and after each move
# Of a kind of interrupt: the vector that is raised, and what is masked for it. Linux grants one MSI message
# here (more need an IOMMU that remaps interrupts); INTx is masked as a whole.
KINDS = {"intx": (2, 0), "msi": (0, 0), "msix": (3, 3)}


async def raise_all(guest: LinuxGuest, vector: int) -> None:
    """Raise a vector again and again; each time it is to arrive."""
    raised = await guest.command(f"irq-raise vector={vector} count={EACH} wait_ms={WAIT_MS}")
    assert raised["lost"] == 0, raised


async def counted(guest: LinuxGuest, vector: int) -> int:
    """Return how often a vector arrived, and that no other one did."""
    counts = (await guest.command("irqs"))["counts"]
    assert sum(counts) == counts[vector], counts
    return int(counts[vector])


async def arrives(guest: LinuxGuest, vector: int, count: int) -> None:
    """Wait for what is on its way, of which there is just enough."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await counted(guest, vector) < count:
            pass
    assert await counted(guest, vector) == count


async def move_with(lab: Lab, guest: LinuxGuest, kind: str) -> None:
    """Take interrupts of a kind before, during and after a move, with one pending behind its mask."""
    vector, mask = KINDS[kind]
    await guest.command(f"irq mode={kind}")
    await raise_all(guest, vector)
    await begin_and_stay(lab)
    await raise_all(guest, vector)
    assert (await lab.source.servers[0].status())["state"] == "PRE_COPY"
    await guest.command(f"irq-mask vector={mask} masked=1")
    await guest.command(f"irq-raise vector={vector}")
    assert await counted(guest, vector) == 2 * EACH
    await let_go(lab)
    assert (await lab.wait_final())["status"] == "completed"
    await lab.wait_running(lab.destination.qemu)
    await lab.follow()
    assert await counted(guest, vector) == 2 * EACH, "masked"
    await guest.command(f"irq-mask vector={mask} masked=0")
    await arrives(guest, vector, 2 * EACH + 1)
    await raise_all(guest, vector)
    assert await counted(guest, vector) == 3 * EACH + 1
    assert (await lab.destination.servers[0].status())["counters"]["irq_errors"] == 0
    await lab.turn_around()


def test_each_kind_delivers_every_interrupt_across_a_move(
    options: Options, in_lab: InLab, guest_image: Path
) -> None:
    """N of N before, during and after; what is masked and pending stays so, and arrives when unmasked."""

    async def scenario(lab: Lab) -> str:
        guest = lab.guest
        assert isinstance(guest, LinuxGuest)
        for kind in KINDS:
            await move_with(lab, guest, kind)
        warnings = (await guest.command("dmesg level=4"))["text"]
        return str(warnings)

    warnings = in_lab(
        options(
            guest_image=guest_image,
            memory_bytes=256 * KIB,
            load=dirtying(0),
            max_bandwidth=256 * MIB,
            downtime_limit_ms=1000,
            warmup_seconds=0.0,
        ),
        scenario,
    )
    assert "nobody cared" not in warnings
    assert "Spurious" not in warnings
