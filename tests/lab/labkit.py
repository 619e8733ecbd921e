"""Options small enough to run in seconds, and waits for what a migration does a moment later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.monitor import Monitor
from vfu_dev.vm.servers import ControlledServer
from vfu_dev.workload import Workload

KIB, MIB = 1 << 10, 1 << 20
# QEMU takes a server that does not answer for 5 s for dead. On a busy machine it may only wait for its turn.
PATIENT = ("-global", f"vfio-user-pci.x-msg-timeout={round(PATIENCE_SECONDS * 1000)}")
# The same for vfio-pci, in the environment of the preloaded library.
PRELOAD_PATIENT = (("VFU_DEV_PRELOAD_TIMEOUT_MS", str(round(PATIENCE_SECONDS * 1000))),)
# Bytes that may be left when the VM stops: fewer than the device's registers, but not none. QEMU counts bytes
# for each millisecond, and where that is 0 it does not look for dirty memory again.
NOTHING_FITS = 100
# What QEMU may call a migration that was cancelled. `migration_cancel()` shuts the return path's socket
# down before it sets the state to "cancelling"; a migration thread that finds it shut calls it "failed".
CANCELLED = ("cancelled", "failed")


def dirtying(rate_bytes: int, pattern: str = "uniform") -> Workload:
    """Return a load that dirties `rate_bytes` of pages a second, by writes of 8 bytes; 0 writes nothing."""
    return Workload(pattern, rate_pages=rate_bytes / 4096) if rate_bytes else Workload("idle")


def small(qemu: Path, library: Path, **changes: Any) -> MigrateOptions:
    """Return options for a 1 MiB device without a CPU that moves within two seconds on an idle machine.

    QEMU switches over below 128 KiB (1.25 MiB/s for 100 ms), so that a 1 MiB device needs PRE_COPY passes.
    """
    values: dict[str, Any] = {
        "qemu": qemu,
        "library": library,
        "memory_bytes": MIB,
        "load": dirtying(512 * KIB),
        "max_bandwidth": 16 * MIB,
        "switchover_bandwidth": 1280 * KIB,
        "downtime_limit_ms": 100,
        "warmup_seconds": 0.2,
        "settle_seconds": 0.2,
        "timeout_seconds": PATIENCE_SECONDS,
        "qemu_extra": PATIENT,
    }
    return MigrateOptions(**{**values, **changes})


def halting_guest(folder: Path) -> Path:
    """Return the folder of a guest that does nothing: a kernel whose first instruction is HLT."""
    image = bytearray(1536)
    image[0x1F1] = 1  # setup sectors
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = b"\xeb\x66"  # jmp 0x268
    image[0x202:0x208] = b"HdrS\x02\x02"
    image[0x268:0x26B] = b"\xf4\xeb\xfd"  # hlt; jmp back to it
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(image)
    (folder / "initramfs.cpio.gz").write_bytes(b"\0")
    return folder


async def until(condition: Callable[[], Coroutine[Any, Any, bool]], what: str) -> None:
    """Wait for a condition that is asked for every few milliseconds."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"not within {PATIENCE_SECONDS:g} s: {what}")


async def wait_back_at_source(lab: Lab, *servers: ControlledServer) -> None:
    """Wait until VM and devices run at the source, after a migration that failed.

    QEMU says "failed" before it takes the devices out of PRE_COPY.

    Args: servers: of the devices that still have one; by default all.
    """

    async def run() -> bool:
        return all(
            [(await server.status())["state"] == "RUNNING" for server in servers or lab.source.servers]
        )

    await lab.wait_running(lab.source.qemu)
    await until(run, "the devices run at the source")


async def wait_moved(qemu: Monitor) -> None:
    """Wait until a source's QEMU is through with the migration; it says "completed" shortly before."""

    async def moved() -> bool:
        return await qemu.run_state() == "postmigrate"

    await until(moved, "the source's VM has moved")


async def stay(lab: Lab) -> None:
    """Have the next migration stay in PRE_COPY until `let_go`, however long that is, whoever begins it.

    In its first 100 ms QEMU knows no bandwidth, and stops if it thinks that nothing is left: there has to be
    more of the guest's RAM or of the device than 4 MiB/s take away in that time.
    """
    slow = {
        "avail_switchover_bandwidth": 1000,  # for the milliseconds below
        "downtime_limit": NOTHING_FITS,
        "max_bandwidth": 4 * MIB,
    }
    await lab.source.qemu.execute("migrate-set-parameters", **slow)


async def begin_and_stay(lab: Lab) -> None:
    """Begin a migration that stays in PRE_COPY until `let_go` (see `stay`); return when it is there."""
    await lab.configure()
    await stay(lab)
    await lab.begin(await lab.listen())
    await lab.wait_for(lambda row: row["source"][0].get("state") == "PRE_COPY", "PRE_COPY")


async def let_ram_go(lab: Lab) -> None:
    """Let a migration that stays in PRE_COPY send guest memory at its full pace; it stays there."""
    await lab.source.qemu.execute("migrate-set-parameters", max_bandwidth=lab.options.max_bandwidth)


async def let_go(lab: Lab) -> None:
    """Let a migration that was kept in PRE_COPY go on as its options say."""
    wanted = {
        "avail_switchover_bandwidth": lab.options.switchover_bandwidth,
        "downtime_limit": lab.options.downtime_limit_ms,
        "max_bandwidth": lab.options.max_bandwidth,
    }
    await lab.source.qemu.execute("migrate-set-parameters", **wanted)
