"""One move: devices under load on one QEMU, live-migrated to another, everything checked."""

from __future__ import annotations

import asyncio
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vfu_dev import __version__
from vfu_dev.errors import LabError
from vfu_dev.lab.clocks import align, compare_clocks
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.observer import MoveReporter, TimeLimitError
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.remote import Destination, FarHost
from vfu_dev.lab.result import MigrationResult
from vfu_dev.sizes import format_size


async def run(
    options: MigrateOptions,
    logs: Path,
    command: list[str],
    reporter: MoveReporter | None = None,
    destination: Destination | None = None,
) -> MigrationResult:
    """Carry out the whole move and return its result; failures are in it, not raised.

    Args: destination: another machine, where the destination's host is.
    Raises: LabError: that one cannot be reached, or lacks something.
    """
    if destination is None:
        return await _run(options, logs, command, reporter, None)
    logs.mkdir(parents=True, exist_ok=True)
    far = FarHost(destination, logs, options)
    try:
        options = replace(options, machine=await far.open())
        return await _run(options, logs, command, reporter, far)
    finally:
        await far.stop()


async def _run(
    options: MigrateOptions,
    logs: Path,
    command: list[str],
    reporter: MoveReporter | None,
    far: FarHost | None,
) -> MigrationResult:
    result = MigrationResult(started=time.time(), command=command, logs=str(logs))
    result.settings = {key: _plain(value) for key, value in asdict(options).items()}
    result.qemu.accel = "qtest" if options.guest_image is None else options.accel
    result.qemu.downtime_limit_ms = options.downtime_limit_ms
    async with Lab(options, logs, reporter, far) as lab:
        lab.describe_sides(result.qemu)
        result.versions = {"vfu-dev": __version__, "python": platform.python_version()}
        result.versions["qemu"] = result.qemu.version or (
            f"{result.qemu.source.version} to {result.qemu.destination.version}"
        )
        result.qemu.parameters = lab.parameters
        try:
            await _run_steps(lab, result)
        except (LabError, OSError) as error:
            result.problems.append(str(error))
        except asyncio.CancelledError:
            if not result.moved:
                raise
            # What the migration itself showed is complete; only what comes after it was cut off.
            result.interrupted = True
            lab.reporter("phase", {"text": "interrupted after the migration; its result is kept"})
        await lab.collect(result)
    if far is not None and (clocks := compare_clocks(result)) is not None:
        result.clocks = clocks.to_json()
        if clocks.differ:
            align(result, clocks)
    result.ended = time.time()
    judge(
        result,
        None if options.replays else options.pre_copy,
        verified=options.read_back is not None and not result.interrupted,
        load=options.load,
        digests=options.verify != "none",
        controlled=not options.server,
        cancelled=lab.cancelled,
    )
    return result


async def _run_steps(lab: Lab, result: MigrationResult) -> None:
    lab.require_migration()
    await lab.start()
    try:
        reply = await lab.migrate()
    except TimeLimitError as error:
        limit = lab.options.timeout_seconds
        result.problems.append(
            f"not finished within {limit:g} s: {why}" if (why := _why(lab)) else str(error)
        )
        await lab.give_up()
        return
    if reply["status"] != "completed":
        return
    await lab.wait_running(lab.destination.qemu)
    result.moved = True
    goes_on = "" if lab.options.load.is_idle else f"; {lab.options.writer} goes on writing on the destination"
    lab.reporter("phase", {"text": f"moved{goes_on}"})
    if lab.options.load_place == "device" and not lab.options.server:
        result.load_status = [await server.command("load-status") for server in lab.source.servers]
    await lab.follow()
    await asyncio.sleep(lab.options.settle_seconds)
    await lab.guest.stop()
    result.guest = lab.guest.figures()
    via = lab.options.read_back
    if via is None:
        return  # digests were compared
    ways = {"mmio": " by MMIO", "dma": " by the device's DMA engine"}
    reader = "the lab" if lab.options.guest_image is None else "the guest"
    lab.reporter("phase", {"text": f"{reader} reads everything back{ways.get(via, '')}"})
    result.guest = await lab.guest.verify(
        via, lambda done, total: lab.reporter("verify", {"compared_bytes": done, "total_bytes": total})
    )


def _why(lab: Lab) -> str | None:
    """Say what kept QEMU from stopping the source, as far as it is known."""
    if lab.convergence is not None:
        return lab.convergence.text
    threshold = lab.samples[-1]["threshold_bytes"] if lab.samples else None
    if lab.options.pre_copy or threshold is None or lab.options.own_device is not None:
        return None
    state = format_size(lab.options.memory_bytes * lab.options.devices)
    return f"without pre-copy up to {state} are left, QEMU's threshold is {format_size(round(threshold))}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
