"""Devices that come and go in a running Linux guest, before a migration and after one."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, PATIENT, begin_and_stay, dirtying, let_go
from pcilab import complaints, distrust, guest_of, wait_devices

from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.builds.qemu_packages import SUITES
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.vm.guest import GuestResult
from vfu_dev.vm.qemu import QmpError
from vfu_dev.workload import Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

LOAD = dirtying(256 * KIB)
# QEMU's q35 has ACPI do it otherwise.
NATIVE_HOTPLUG = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")


@dataclass
class Story:
    """What came of each step."""

    moves: list[MigrationResult] = field(default_factory=list)
    checks: list[GuestResult] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    reset: dict[str, Any] = field(default_factory=dict)


async def move(lab: Lab, story: Story) -> None:
    """Move the VM under load, check every byte of every device, and be ready for the next move."""
    guest = guest_of(lab)
    await guest.start(LOAD)
    result = await lab.move()
    await guest.stop()
    story.checks.append(await guest.verify())
    judge(result, None, verified=False)
    story.moves.append(result)
    await lab.turn_around()


@pytest.mark.parametrize("name", ["patched", SUITES[-1].name])
def test_devices_come_and_go(
    name: str,
    options: Options,
    in_lab: InLab,
    guest_image: Path,
    qemu: Path,
    stock_qemu: Callable[[str], QemuBinary],
) -> None:
    """One is added and moves along; after a move it is removed, and another one added after the next.

    No destination needs one that left, and each has those that came: by `device_add`, or from the start. The
    guest's kernel takes each device up and lets it go without a complaint, and uses it as any other.
    """

    async def scenario(lab: Lab) -> Story:
        guest, story = guest_of(lab), Story()
        await lab.plug(both=True)  # before a migration
        await wait_devices(guest, 2)
        await move(lab, story)

        await guest.command("release device=1")  # after one
        await lab.unplug()
        await move(lab, story)

        await lab.plug()  # into the port that was used before, with a server that nobody knows yet
        await wait_devices(guest, 2)
        story.reset = await guest.command("reset device=1")
        await move(lab, story)
        story.complaints = await complaints(guest)
        return story

    story = in_lab(
        options(
            qemu=qemu if name == "patched" else stock_qemu(name).path,
            guest_image=guest_image,
            memory_bytes=256 * KIB,
            load=Workload("idle"),
            spare_ports=1,
            max_bandwidth=256 * MIB,
            warmup_seconds=0.0,
        ),
        scenario,
    )
    assert [result.problems for result in story.moves] == [[], [], []]
    assert [len(result.devices) for result in story.moves] == [2, 1, 2]
    assert [check.verified for check in story.checks] == [True] * 3
    assert [check.compared_bytes for check in story.checks] == [512 * KIB, 256 * KIB, 512 * KIB]
    assert story.reset["methods"].split()[0] == "flr"
    assert story.reset["scratch_cleared"]
    assert story.complaints == []


def test_a_device_whose_server_died_is_replaced(options: Options, in_lab: InLab, guest_image: Path) -> None:
    """The VM lives on without it, lets go of it, takes up a fresh one in its place, and migrates again.

    Here hot-plug is PCI Express's own: the port has an attention button and a link that goes up and down.
    """

    async def scenario(lab: Lab) -> tuple[str, Story]:
        guest, story = guest_of(lab), Story()
        await lab.source.servers[1].kill()
        assert await lab.source.qemu.run_state() == "running"
        dead = (await guest.command("lspci device=1"))["text"]
        await guest.command("release device=1")
        await lab.unplug()
        await lab.plug()
        await wait_devices(guest, 2)
        story.complaints = await complaints(guest)
        assert "Link Up" in (await guest.command("dmesg match=pciehp"))["text"]
        await move(lab, story)
        return dead, story

    dead, story = in_lab(
        options(
            guest_image=guest_image,
            memory_bytes=256 * KIB,
            devices=2,
            qemu_extra=(*PATIENT, *NATIVE_HOTPLUG),
            load=Workload("idle"),
            max_bandwidth=256 * MIB,
            warmup_seconds=0.0,
        ),
        scenario,
    )
    assert distrust(dead), "a device that is gone reads as all ones, and lspci says so"
    assert story.moves[0].problems == []
    assert story.checks[0].verified
    assert story.checks[0].compared_bytes == 512 * KIB
    assert story.complaints == []


def test_nothing_is_plugged_while_a_vm_moves(options: Options, in_lab: InLab, guest_image: Path) -> None:
    """QEMU refuses both with a reason; the migration goes on, and afterwards it works."""

    async def scenario(lab: Lab) -> tuple[list[str], MigrationResult]:
        guest = guest_of(lab)
        await begin_and_stay(lab)
        refused = []
        for change in (lab.source.plug, lab.source.unplug):
            with pytest.raises(QmpError) as caught:
                await change()
            refused.append(caught.value.reason)
        assert (await lab.source.servers[0].status())["state"] == "PRE_COPY"
        await let_go(lab)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        await guest.follow(lab.destination.qemu)
        result = MigrationResult(guest=await guest.verify())
        await lab.collect(result)
        judge(result, None)
        await lab.turn_around()
        await lab.plug()
        await wait_devices(guest, 2)
        return refused, result

    refused, result = in_lab(
        options(
            guest_image=guest_image,
            memory_bytes=256 * KIB,
            load=Workload("idle"),
            spare_ports=1,
            max_bandwidth=256 * MIB,
            warmup_seconds=0.0,
        ),
        scenario,
    )
    assert all("migrat" in reason for reason in refused), refused
    assert result.problems == []
