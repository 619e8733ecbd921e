"""Resets by a real guest while it lives and moves: function level, soft, and of the whole machine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, begin_and_stay, dirtying, let_go
from pcilab import complaints, guest_of

from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.vm.qemu import Qemu
from vfu_dev.workload import Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]


@dataclass(frozen=True)
class Reset:
    """One reset, seen from both sides."""

    reply: dict[str, Any]
    resets: int  # that the server counted
    state: str  # of the device, after it
    migration: str  # QEMU's, after it


async def reset(lab: Lab, kind: str, server: int = 0) -> Reset:
    """Have the guest on the source reset its device."""
    before = (await lab.source.servers[server].status())["counters"]["resets"]
    reply = await guest_of(lab).command(f"reset kind={kind}")
    status = await lab.source.servers[server].status()
    migration = await lab.source.qemu.migration()
    return Reset(
        reply, status["counters"]["resets"] - before, status["state"], migration.get("status", "none")
    )


async def finish(lab: Lab) -> MigrationResult:
    """Let the migration complete, follow the guest, and judge."""
    await let_go(lab)
    assert (await lab.wait_final())["status"] == "completed"
    await lab.wait_running(lab.destination.qemu)
    await lab.guest.follow(lab.destination.qemu)
    result = MigrationResult()
    await lab.guest.stop()
    result.guest = await lab.guest.verify()
    await lab.collect(result)
    judge(result, lab.options.pre_copy)
    return result


def test_the_guest_resets_its_device_at_any_time(
    options: Options, in_lab: InLab, guest_image: Path, tmp_path: Path
) -> None:
    """Running, in PRE_COPY, after the move, under load: registers go, memory and migration stay."""

    async def scenario(lab: Lab) -> tuple[list[Reset], MigrationResult, list[str]]:
        seen = [await reset(lab, "kernel"), await reset(lab, "soft")]
        await begin_and_stay(lab)
        seen += [await reset(lab, "soft"), await reset(lab, "kernel")]
        result = await finish(lab)
        await lab.turn_around()
        seen += [await reset(lab, "kernel"), await reset(lab, "soft")]
        return seen, result, await complaints(guest_of(lab))

    chosen = options(
        guest_image=guest_image, memory_bytes=256 * KIB, load=dirtying(256 * KIB), max_bandwidth=256 * MIB
    )
    seen, result, said = in_lab(chosen, scenario)
    assert result.problems == []
    assert said == []
    assert [one.state for one in seen] == ["RUNNING"] * 2 + ["PRE_COPY"] * 2 + ["RUNNING"] * 2
    assert [one.migration for one in seen[2:4]] == ["active"] * 2
    for one, counted in zip(seen, (1, 0, 0, 1, 1, 0), strict=True):
        assert one.reply["scratch_cleared"]
        assert one.reply["methods"].split()[0] == "flr"
        assert one.resets == counted, (
            "a soft reset is a register write; a function reset is one reset, not two"
        )
    log = (tmp_path / "logs" / "server-destination-vfu0.log").read_text()
    assert "reset by the client (PCI_FLR)" in log


async def up_again(lab: Lab, qemu: Qemu, resets_before: int) -> int:
    """Wait until the guest on `qemu` has booted; returns how often its device was reset meanwhile."""
    await lab.guest.ready(qemu)
    side = lab.source if qemu is lab.source.qemu else lab.destination
    return int((await side.servers[0].status())["counters"]["resets"]) - resets_before


async def resets_of(lab: Lab) -> int:
    return int((await lab.source.servers[0].status())["counters"]["resets"])


@pytest.fixture
def rebooting(options: Options, guest_image: Path) -> MigrateOptions:
    """Options of a guest that may reboot."""
    return options(
        guest_image=guest_image,
        memory_bytes=256 * KIB,
        load=Workload("idle"),
        reboot=True,
        max_bandwidth=256 * MIB,
        warmup_seconds=0.0,
    )


def test_a_guest_reboots_before_during_and_after_a_migration(
    rebooting: MigrateOptions, in_lab: InLab
) -> None:
    """The machine comes up again each time, the device with it; the migration it was in completes.

    Before the move the guest reboots by itself, in PRE_COPY QEMU resets it, and after it it reboots again.
    """

    async def scenario(lab: Lab) -> tuple[list[int], list[str], list[MigrationResult], list[str]]:
        guest = guest_of(lab)
        resets, states, moves = [], [], []
        before = await resets_of(lab)
        await guest.command("reboot")
        resets.append(await up_again(lab, lab.source.qemu, before))

        await begin_and_stay(lab)
        before = await resets_of(lab)
        await lab.source.qemu.execute("system_reset")
        resets.append(await up_again(lab, lab.source.qemu, before))
        states.append((await lab.source.servers[0].status())["state"])
        await guest.start(dirtying(256 * KIB))
        moves.append(await finish(lab))
        await lab.turn_around()

        before = await resets_of(lab)
        await guest.command("reboot")
        resets.append(await up_again(lab, lab.source.qemu, before))
        said = await complaints(guest)
        again = await reset(lab, "kernel")
        states.append(again.state)
        moves.append(await lab.move())
        judge(moves[-1], None, verified=False)
        return resets, states, moves, said

    resets, states, moves, said = in_lab(rebooting, scenario)
    assert all(count >= 1 for count in resets), resets
    assert states == ["PRE_COPY", "RUNNING"]
    assert [move.problems for move in moves] == [[], []]
    assert said == []
