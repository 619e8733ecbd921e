"""`vfu-dev load --guest`: the load from inside a Linux guest, commanded over its serial port."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from labkit import KIB
from serverkit import VFU_DEV

from vfu_dev.lab.guest import LinuxGuest
from vfu_dev.lab.migrate import Lab, MigrateOptions
from vfu_dev.patterns import LoadSpec

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
    async with asyncio.timeout(60):
        if interrupt:
            assert b"writes/s" in await process.stderr.readline()
            process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    return process.returncode or 0, json.loads(out)


def test_a_guest_makes_the_load(options: Options, guest_image: Path, in_lab: InLab) -> None:
    """By its CPU and by DMA, for a time and until interrupted; the guest finds what it wrote."""
    chosen = options(guest_image=guest_image, memory_bytes=256 * KIB, load=LoadSpec("idle"), devices=2)

    async def scenario(lab: Lab) -> None:
        guest, line = lab.guest, lab.source.qemu.line_socket
        assert isinstance(guest, LinuxGuest)
        await guest.close()  # the port takes one at a time
        for via in ("mmio", "dma"):
            status, result = await load(line, "--rate", "500p", "--duration", "1.5", "--via", via)
            assert status in (0, 3)
            assert (status == 3) is not result["keeps_up"]
            assert result["place"] == "guest"
            # Two devices, each with that load, in writes of 8 bytes.
            assert result["asked_rate_bytes"] == 2 * 500 * 8
            due = result["writes"] + result["missed_writes"]
            assert 1000 * (result["seconds"] - 0.25) * 0.95 <= due <= 1000 * result["seconds"] * 1.05
        status, result = await load(line, "--rate", "100000000p", "--duration", "1")
        assert status == 3
        assert result["carried"] < 0.95
        status, result = await load(line, "--rate", "500p", "--duration", "0", interrupt=True)
        assert status == 0
        assert result["interrupted"]
        await guest.ready(lab.source.qemu)
        assert not guest.status["running"]
        found = await guest.command("verify via=dma", 60)
        assert found["verified"], found

    in_lab(chosen, scenario)
