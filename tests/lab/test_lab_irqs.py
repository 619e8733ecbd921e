"""Interrupts while a real QEMU migrates the device: masked, pending, and raised in the last instant."""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from labkit import MIB, until
from qtestkit import Registers, migrate, moving

from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.qtest import CONFIG_ADDRESS, CONFIG_DATA
from vfu_dev.vm.qtest_device import PCI_BASE_ADDRESS_0

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

MESSAGES = 12 * MIB  # where messages are written to, instead of an APIC
CAPABILITIES, MSI_CAPABILITY, MSIX_CAPABILITY = 0x34, 0x05, 0x11
ENTRY_BYTES = 16
MSI_ENABLE, FOUR_MESSAGES = 1, 2 << 4


async def find_capability(registers: Registers, number: int) -> tuple[int, int]:
    """Return the offset of a capability and its first word."""
    offset = await registers.config(CAPABILITIES) & 0xFF
    while (word := await registers.config(offset)) & 0xFF != number:
        offset = word >> 8 & 0xFF
    return offset, word


async def write_control(registers: Registers, offset: int, value: int) -> None:
    """Write the upper half of a capability's first word alone: the lower one may not be written."""
    select = f"outl {CONFIG_ADDRESS:#x} {0x80000000 | registers.device.slot << 11 | offset:#x}"
    assert registers.guest.client is not None
    await registers.guest.client.batch([select, f"outw {CONFIG_DATA + 2:#x} {value:#x}"])


class Msix:
    """MSI-X whose vectors write their number + 1 to a word of RAM each."""

    def __init__(self, registers: Registers) -> None:
        self.registers = registers
        self.table = 0

    async def set_up(self) -> None:
        """Enable four vectors."""
        client = self.registers.guest.client
        assert client is not None
        self.table = await self.registers.config(PCI_BASE_ADDRESS_0 + 16) & ~0xF
        offset, word = await find_capability(self.registers, MSIX_CAPABILITY)
        await write_control(self.registers, offset, word >> 16 | 1 << 15)
        for vector in range(4):
            entry = self.table + ENTRY_BYTES * vector
            for at, value in ((0, MESSAGES + 4 * vector), (4, 0), (8, vector + 1), (12, 0)):
                await client.write(4, entry + at, value)

    async def mask(self, vector: int, masked: bool) -> None:
        """Set or clear the mask bit of a vector."""
        assert self.registers.guest.client is not None
        await self.registers.guest.client.write(4, self.table + ENTRY_BYTES * vector + 12, masked)

    async def arrived(self) -> list[int]:
        """Return the vectors whose messages are in RAM, and clear them."""
        client = self.registers.guest.client
        assert client is not None
        words = struct.unpack("<4I", await client.read_block(MESSAGES, 16))
        found = [word - 1 for word in words if word]
        for vector in found:  # another message may arrive meanwhile
            await client.write(4, MESSAGES + 4 * vector, 0)
        return found


class Msi:
    """MSI, whose messages all go to one address: the last one alone can be seen in RAM."""

    def __init__(self, registers: Registers) -> None:
        self.registers = registers
        self.offset = 0

    async def set_up(self) -> None:
        """Enable four messages, of which the number is in the lowest bits."""
        client, slot = self.registers.guest.client, self.registers.device.slot
        assert client is not None
        self.offset, word = await find_capability(self.registers, MSI_CAPABILITY)
        await client.config_write(slot, self.offset + 4, MESSAGES)
        await client.config_write(slot, self.offset + 8, 0)
        await client.config_write(slot, self.offset + 12, 0x100)
        await write_control(self.registers, self.offset, word >> 16 | MSI_ENABLE | FOUR_MESSAGES)

    async def mask(self, vector: int, masked: bool) -> None:
        """Set the mask bit of one vector, clear those of all others."""
        assert self.registers.guest.client is not None
        slot = self.registers.device.slot
        await self.registers.guest.client.config_write(slot, self.offset + 16, masked << vector)

    async def pending(self) -> int:
        """Return the pending bits."""
        return await self.registers.config(self.offset + 20)

    async def arrived(self) -> list[int]:
        """Return the vector of the message in RAM, and clear it."""
        client = self.registers.guest.client
        assert client is not None
        word = await client.read(4, MESSAGES)
        if word:
            await client.write(4, MESSAGES, 0)
        return [word - 0x100] if word else []


KINDS = [pytest.param(Msi, id="msi"), pytest.param(Msix, id="msix")]


async def only(messages: Msi | Msix, vector: int) -> None:
    """Wait for one message, and no other."""
    found: list[int] = []

    async def some() -> bool:
        found.extend(await messages.arrived())
        return bool(found)

    await until(some, f"vector {vector}")
    assert found == [vector]


@pytest.mark.parametrize(("kind", "masked"), [(Msi, 2), (Msix, 2), (Msix, 3)])
def test_masked_and_pending_interrupts_survive(
    options: Options, in_lab: InLab, kind: type[Msi | Msix], masked: int
) -> None:
    """One delivered before, one masked and pending while it moves: unmasked there, it is delivered there.

    QEMU keeps masks and what is pending behind them. For MSI-X it asks the server when the guest reads the
    PBA, so that a guest cannot see it there (vfio_user_pba_read); the message tells. A masked vector below
    others is what a destination without one of our patches dies of, and a pending message of MSI is what it
    refuses to load without another.
    """

    async def scenario(lab: Lab) -> None:
        registers = Registers(lab)
        messages = kind(registers)
        await messages.set_up()
        await messages.mask(masked, True)
        await registers.set(irq_raise=masked)
        await registers.set(irq_raise=1)
        await only(messages, 1)
        if isinstance(messages, Msi):
            assert await messages.pending() == 1 << masked
        await migrate(lab)
        assert await messages.arrived() == []
        if isinstance(messages, Msi):
            assert await messages.pending() == 1 << masked
        await messages.mask(masked, False)
        await only(messages, masked)
        await registers.set(irq_raise=0)
        await only(messages, 0)
        for side in (lab.source, lab.destination):
            assert (await side.servers[0].status())["counters"]["irq_errors"] == 0

    in_lab(moving(options), scenario)


def last_stop(options: Options, kind: str) -> MigrateOptions:
    """Return options with a device that raises vector 1 when it is told to be quiet."""
    device = f"{Path(__file__).parent / 'laststop.py'}:{kind}"
    return replace(moving(options), server_extra=("--device", device))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_of_the_last_instant_is_delivered_there(
    options: Options, in_lab: InLab, kind: type[Msi | Msix]
) -> None:
    """Raised when QEMU waits for the device to be quiet: the guest gets it once, on the destination."""

    async def scenario(lab: Lab) -> None:
        registers = Registers(lab)
        messages = kind(registers)
        await messages.set_up()
        await migrate(lab)
        await only(messages, 1)
        counters = [(await side.servers[0].status())["counters"] for side in (lab.source, lab.destination)]
        assert counters[0]["irqs"] >= 1
        assert [one["irq_errors"] for one in counters] == [0, 0]
        await registers.set(irq_raise=2)
        await only(messages, 2)
        assert await messages.arrived() == []

    in_lab(last_stop(options, "LastStop"), scenario)


def test_without_taking_it_back_the_same_interrupt_is_lost(options: Options, in_lab: InLab) -> None:
    """QEMU does not look at the eventfd before it sends the VM's state: the test above can fail."""

    async def scenario(lab: Lab) -> None:
        registers = Registers(lab)
        messages = Msix(registers)
        await messages.set_up()
        await migrate(lab)
        assert (await lab.source.servers[0].status())["counters"]["irqs"] >= 1
        await registers.set(irq_raise=2)
        await only(messages, 2)
        assert await messages.arrived() == []

    in_lab(last_stop(options, "LastStopLost"), scenario)
