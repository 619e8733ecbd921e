"""What a Linux guest sees on its PCI bus: before a migration, after it, and after a reset.

One VM is booted for all of it, and moved while its device sleeps in D3hot.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, small
from pcilab import (
    CACHE_LINE_SIZE,
    CAP_EXP,
    CAP_MSIX,
    CAP_PM,
    COMMAND,
    EXP_DEVCTL,
    EXP_LNKCTL,
    INTERRUPT_LINE,
    MSIX_FLAGS,
    PM_CTRL,
    Sight,
    capability,
    config,
    config_space,
    distrust,
    guest_of,
    look,
)
from serverkit import PATIENCE_SECONDS

from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.result import MigrationResult
from vfu_dev.workload import Workload

D0, D3_HOT = 0, 3
WAIT_MS = round(PATIENCE_SECONDS * 1000)  # for an interrupt


@dataclass
class Journey:
    """What was seen on the way."""

    before: Sight
    asleep_before: bytes
    asleep_after: bytes
    after: Sight
    reset: dict[str, Any]
    after_reset: Sight
    offsets: dict[int, int]
    move: MigrationResult
    interrupts: list[dict[str, Any]] = field(default_factory=list)


async def travel(lab: Lab) -> Journey:
    guest = guest_of(lab)
    assert (await guest.command("irq mode=msix"))["vectors"] == 4
    offsets = {number: await capability(guest, number) for number in (CAP_PM, CAP_EXP, CAP_MSIX)}
    await config(guest, INTERRUPT_LINE, 1, 0x2B)
    await config(guest, CACHE_LINE_SIZE, 1, 0x10)
    await config(guest, offsets[CAP_EXP] + EXP_DEVCTL, 2, 0x500F)
    await config(guest, offsets[CAP_EXP] + EXP_LNKCTL, 2, 0x0040)
    before = await look(guest)
    power = offsets[CAP_PM] + PM_CTRL
    await config(guest, power, 2, D3_HOT)
    asleep_before = await config_space(guest)
    move = await lab.move()
    asleep_after = await config_space(guest)
    await config(guest, power, 2, D0)
    after = await look(guest)
    interrupts = []
    await guest.command(f"irq-raise vector=2 wait_ms={WAIT_MS}")
    interrupts.append(await guest.command("irqs"))
    reset = await guest.command("reset")
    after_reset = await look(guest)
    await guest.command(f"irq-raise vector=3 wait_ms={WAIT_MS}")
    interrupts.append(await guest.command("irqs"))
    move.guest = await guest.verify()
    judge(move, lab.options.pre_copy)
    return Journey(before, asleep_before, asleep_after, after, reset, after_reset, offsets, move, interrupts)


@pytest.fixture(scope="module")
def journey(
    qemu: Path, library: Path, guest_image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Journey:
    """Boot, look, move, look, reset, look."""
    options = small(
        qemu,
        library,
        guest_image=guest_image,
        memory_bytes=256 * KIB,
        load=Workload("idle"),
        max_bandwidth=256 * MIB,
        warmup_seconds=0.0,
    )

    async def whole() -> Journey:
        async with Lab(options, tmp_path_factory.mktemp("pci")) as lab:
            await lab.start()
            return await travel(lab)

    return asyncio.run(whole())


def test_lspci_shows_bars_and_capabilities(journey: Journey) -> None:
    """BARs where firmware put them, power management, an Express endpoint with FLR, INTx, MSI and MSI-X."""
    text = journey.before.lspci
    for expected in (
        r"System peripheral \[0880\]: Device \[4656:4455\] \(rev 01\)",
        r"Subsystem: Device \[4656:4455\]",
        r"Control: I/O- Mem\+ BusMaster\+",
        r"Interrupt: pin A routed to IRQ \d+",
        r"Region 0: Memory at [0-9a-f]+ \(32-bit, non-prefetchable\) \[size=4K\]",
        r"Region 2: Memory at [0-9a-f]+ \(64-bit, prefetchable\) \[size=256K\]",
        r"Region 4: Memory at [0-9a-f]+ \(32-bit, non-prefetchable\) \[size=4K\]",
        r"Power Management version 3",
        r"Status: D0 NoSoftRst\+ PME-Enable-",
        r"Express \(v2\) Endpoint",
        r"RBE\+ FLReset\+",
        r"LnkSta:\s+Speed 5GT/s, Width x4",
        r"MSI: Enable- Count=1/4 Maskable\+ 64bit\+",
        r"MSI-X: Enable\+ Count=4 Masked-",
        r"Vector table: BAR=4 offset=00000000",
        r"PBA: BAR=4 offset=00000800",
        r"Kernel driver in use: vfud",
    ):
        assert re.search(expected, text), f"{expected}\n{text}"


@pytest.mark.parametrize("when", ["before", "after", "after_reset"])
def test_lspci_believes_all_of_it(journey: Journey, when: str) -> None:
    """No "!!!", no "unknown", nothing that it could not read, on the whole bus."""
    sight: Sight = getattr(journey, when)
    assert "01:00.0" in sight.everything
    assert distrust(sight.everything) == []


@pytest.mark.parametrize("when", ["before", "after", "after_reset"])
def test_the_kernel_has_no_complaint(journey: Journey, when: str) -> None:
    """No warning or error that has to do with the bus, and no bad news of it at any level."""
    assert getattr(journey, when).complaints == []


def test_lspci_is_the_same_after_the_migration(journey: Journey) -> None:
    """The whole bus, not only the device."""
    assert journey.after.everything == journey.before.everything
    assert journey.after.lspci == journey.before.lspci


def test_power_state_and_configuration_survive_the_migration(journey: Journey) -> None:
    """The device arrives in D3hot, every byte of its configuration space as it was; D0 brings all back."""
    power = journey.offsets[CAP_PM] + PM_CTRL
    asleep = journey.asleep_before
    assert asleep[power] & 3 == D3_HOT
    assert journey.asleep_after == asleep
    assert journey.after.config == journey.before.config
    found = journey.after.config
    express, msix = journey.offsets[CAP_EXP], journey.offsets[CAP_MSIX]
    assert found[COMMAND] & 0x6 == 0x6, "memory and bus mastering on"
    assert (found[INTERRUPT_LINE], found[CACHE_LINE_SIZE]) == (0x2B, 0x10)
    assert found[express + EXP_DEVCTL : express + EXP_DEVCTL + 2] == b"\x0f\x50"
    assert found[express + EXP_LNKCTL : express + EXP_LNKCTL + 2] == b"\x40\x00"
    assert found[msix + MSIX_FLAGS + 1] & 0xC0 == 0x80, "MSI-X on, not masked"


def test_the_migration_itself_went_well(journey: Journey) -> None:
    """A device without power migrates like any other."""
    assert journey.move.problems == []


def test_the_kernel_resets_the_function(journey: Journey) -> None:
    """Linux prefers FLR, it works, and what it saves and restores makes the device what it was."""
    assert journey.reset["methods"].split()[0] == "flr"
    assert journey.reset["scratch_cleared"]
    assert journey.after_reset.lspci == journey.before.lspci
    assert journey.after_reset.config == journey.before.config


def test_interrupts_arrive_after_migration_and_reset(journey: Journey) -> None:
    """MSI-X stays set up through both."""
    assert [one["counts"] for one in journey.interrupts] == [[0, 0, 1, 0], [0, 0, 1, 1]]
