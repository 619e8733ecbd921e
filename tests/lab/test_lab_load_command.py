"""Loads with a real QEMU: `vfu-dev load --guest`, and the device's own load that its registers set."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from labkit import KIB, until
from qtestkit import Registers, migrate, moving
from serverkit import PATIENCE_SECONDS, VFU_DEV

from vfu_dev.device.reference.layout import CTRL_PAGES, CTRL_RUN, LoadPattern
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.guest import LinuxGuest
from vfu_dev.workload import ArrayWriter, Workload, writes_of

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]


async def load(line: Path, *arguments: str, interrupt: bool = False) -> tuple[int, dict[str, Any]]:
    """Run the command, interrupt it when it says that it writes, and return exit status and JSON."""
    process = await asyncio.create_subprocess_exec(
        *[*VFU_DEV, "load", "--guest", str(line), "--json", "-", *arguments],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        if interrupt:
            assert b"writes/s" in await process.stderr.readline()
            process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    return process.returncode or 0, json.loads(out)


def test_a_guest_makes_the_load(options: Options, guest_image: Path, in_lab: InLab) -> None:
    """By its CPU and by DMA, for a time and until interrupted; the guest finds what it wrote."""
    chosen = options(guest_image=guest_image, memory_bytes=256 * KIB, load=Workload("idle"), devices=2)

    async def scenario(lab: Lab) -> None:
        guest, line = lab.guest, lab.source.qemu.line_socket
        assert isinstance(guest, LinuxGuest)
        await guest.close()  # the port takes one at a time
        for via in ("mmio", "dma"):
            status, result = await load(line, "--dirty-rate", "500p", "--duration", "1.5", "--via", via)
            assert status in (0, 3)
            assert (status == 3) is not result["keeps_up"]
            assert result["place"] == "guest"
            # Two devices, each with that load, in writes of 8 bytes.
            assert result["asked_rate_bytes"] == 2 * 500 * 8
            due = result["writes"] + result["missed_writes"]
            assert 1000 * (result["seconds"] - 0.25) * 0.95 <= due <= 1000 * result["seconds"] * 1.05
        status, result = await load(line, "--dirty-rate", "100000000p", "--duration", "1")
        assert status == 3
        assert result["carried"] < 0.95
        status, result = await load(line, "--dirty-rate", "500p", "--duration", "0", interrupt=True)
        assert status in (0, 3)
        assert (status == 3) is not result["keeps_up"]
        assert result["interrupted"]
        await guest.ready(lab.source.qemu)
        assert not guest.status["running"]
        found = await guest.command("verify via=dma")
        assert found["verified"], found

    in_lab(chosen, scenario)


def test_the_devices_own_load_moves_with_its_registers(options: Options, in_lab: InLab) -> None:
    """Begun by the guest on one QEMU, gone on with on the other: together they are one load."""
    spec = Workload("hotset", rate_pages=3000, write_bytes=64, seed=5, hot_fraction=0.2, hot_share=0.7)

    async def scenario(lab: Lab) -> None:
        registers = Registers(lab)

        async def written(more_than: int) -> bool:
            return await registers.get("load_count") > more_than

        await registers.set(load_rate=3000, load_seed=5, load_pattern=LoadPattern.HOTSET, load_write_bytes=64)
        await registers.set(
            load_hot_fraction=200_000, load_hot_share=700_000, load_ctrl=CTRL_RUN | CTRL_PAGES
        )
        await until(lambda: written(300), "the source writes")
        await migrate(lab)
        moved = await registers.get("load_count")
        assert moved > 300
        await until(lambda: written(moved + 300), "the destination goes on")
        await registers.set(load_ctrl=0)
        count, device = await registers.get("load_count"), registers.device
        writes = writes_of(spec, device.size_bytes)
        assert writes is not None
        expected = device.journal.read(0, device.size_bytes)
        ArrayWriter(expected, 4096, writes).write(0, count)
        client = registers.guest.client
        assert client is not None
        assert await client.read_block(device.bar2, device.size_bytes) == expected.tobytes()

    in_lab(moving(options), scenario)
