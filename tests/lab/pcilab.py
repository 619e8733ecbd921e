"""What tests of the PCI bus ask of a Linux guest."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from serverkit import PATIENCE_SECONDS

from vfu_dev.lab.lab import Lab
from vfu_dev.vm.guest import LinuxGuest

# <linux/pci_regs.h>
CAP_PM, CAP_EXP, CAP_MSIX = 0x01, 0x10, 0x11
COMMAND, CACHE_LINE_SIZE, CAPABILITY_LIST, INTERRUPT_LINE = 0x04, 0x0C, 0x34, 0x3C
PM_CTRL, EXP_DEVCTL, EXP_LNKCTL, MSIX_FLAGS = 4, 8, 0x10, 2

# Of warnings, those that have to do with the bus: the clock's calibration, say, suffers on a busy machine.
_BUS = re.compile(r"pci|vfud|\bAER\b|\bMSI|\birq\b|0000:", re.IGNORECASE)
# A module of ours is neither in the kernel's tree nor signed.
# QEMU 11.1's tables describe IRQ 3 and 4, those of the serial ports, in a way that Linux sets right.
_EXPECTED = re.compile(
    r"vfud: loading out-of-tree module taints kernel|ACPI: IRQ [34] override to edge\(!\), high\(!\)"
)
# Much of what goes wrong on the bus is told at the level of information: "BAR 2: failed to assign".
_BAD = re.compile(
    r"fail|error|can.?t|cannot|invalid|bogus|no space|not ready|unable|disabling|timed? ?out|stuck|overlap"
    r"|conflict|unknown|unexpected|bug|broken|degraded|limited by",
    re.IGNORECASE,
)
# What lspci prints where it does not trust what it reads.
_DISTRUST = re.compile(r"!!!|unknown|invalid|denied|corrupted|\?\?")


def guest_of(lab: Lab) -> LinuxGuest:
    """Return the lab's guest, which is a Linux."""
    assert isinstance(lab.guest, LinuxGuest)
    return lab.guest


async def config(guest: LinuxGuest, offset: int, size: int = 2, value: int | None = None) -> int:
    """Return a register of the first device's configuration space, after writing `value` to it if given."""
    text = f"config offset={offset} size={size}" + ("" if value is None else f" value={value}")
    return int((await guest.command(text))["value"])


async def config_space(guest: LinuxGuest) -> bytes:
    """Return the first 256 bytes of it."""
    words = [await config(guest, offset, 4) for offset in range(0, 256, 4)]
    return b"".join(word.to_bytes(4, "little") for word in words)


async def capability(guest: LinuxGuest, number: int) -> int:
    """Return the offset of a capability."""
    offset = await config(guest, CAPABILITY_LIST, 1)
    while await config(guest, offset, 1) != number:
        offset = await config(guest, offset + 1, 1)
        assert offset, f"no capability {number:#x}"
    return offset


async def complaints(guest: LinuxGuest) -> list[str]:
    """Return what the guest's kernel has to say against the PCI bus: warnings, and bad news of any level."""
    warnings = (await guest.command("dmesg level=4"))["text"].splitlines()
    bus = (await guest.command("dmesg match=0000:"))["text"].splitlines()
    found = [line for line in warnings if _BUS.search(line) and not _EXPECTED.search(line)]
    return found + [line for line in bus if _BAD.search(line)]


def distrust(text: str) -> list[str]:
    """Return the lines of lspci's output that show that it did not understand, or believe, what it read."""
    return [line for line in text.splitlines() if _DISTRUST.search(line)]


async def wait_devices(guest: LinuxGuest, count: int) -> None:
    """Wait until the guest has that number of devices and can use them.

    It is asked without a pause, also while its kernel is still taking a device up.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := (await guest.command("rescan"))["devices"]) != count:
        assert time.monotonic() < deadline, f"the guest has {found} devices, not {count}"


@dataclass(frozen=True)
class Sight:
    """What the guest sees of its device at one moment."""

    lspci: str
    everything: str
    config: bytes
    complaints: list[str]


async def look(guest: LinuxGuest) -> Sight:
    """Return what the guest sees now."""
    return Sight(
        (await guest.command("lspci device=0"))["text"],
        (await guest.command("lspci"))["text"],
        await config_space(guest),
        await complaints(guest),
    )
