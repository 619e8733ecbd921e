"""Migrations that pause before the switchover, as every one that libvirt starts does.

With the capability `pause-before-switchover` QEMU stops the VM and then waits for `migrate-continue`, before
it reads what the devices hold back for STOP_COPY. Management uses the pause to take disks over; the lab
does not need it, so it answers as soon as QEMU reports that it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vfu_dev.errors import LabError
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.monitor import Monitor

CAPABILITY = "pause-before-switchover"
PAUSED = "pre-switchover"


def pauses(options: MigrateOptions) -> bool:
    """Return whether the move pauses."""
    return dict(options.capabilities).get(CAPABILITY, False)


@contextlib.asynccontextmanager
async def going_on(source: Monitor, timeout_seconds: float) -> AsyncIterator[None]:
    """Answer the pause of a migration that begins within the block."""
    task = asyncio.create_task(_answer(source, len(source.events), timeout_seconds))
    try:
        yield
    finally:
        task.cancel()
        # What went wrong shows in the migration's end.
        with contextlib.suppress(asyncio.CancelledError, LabError):
            await task


async def _answer(source: Monitor, seen: int, timeout_seconds: float) -> None:
    await source.wait_event("MIGRATION", timeout_seconds, first=seen, status=PAUSED)
    await source.execute("migrate-continue", state=PAUSED)
