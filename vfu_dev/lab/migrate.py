"""One move: devices under load on one QEMU, live-migrated to another, everything checked."""

from __future__ import annotations

import asyncio
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vfu_dev import __version__
from vfu_dev.builds.qemu_binary import probe_qemu
from vfu_dev.errors import LabError
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab, MoveReporter, TimeLimitError
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.sizes import format_size


async def run(
    options: MigrateOptions, logs: Path, command: list[str], reporter: MoveReporter | None = None
) -> MigrationResult:
    """Carry out the whole move and return its result; failures are in it, not raised."""
    features = probe_qemu(options.qemu)
    result = MigrationResult(started=time.time(), command=command, logs=str(logs))
    result.settings = {key: _plain(value) for key, value in asdict(options).items()}
    result.versions = {"vfu-dev": __version__, "python": platform.python_version(), "qemu": features.version}
    result.qemu.version, result.qemu.accel = features.version, options.accel
    if options.guest_image is None:
        result.qemu.accel = "qtest"
    result.qemu.downtime_limit_ms = options.downtime_limit_ms
    async with Lab(options, logs, reporter) as lab:
        result.qemu.parameters = lab.parameters()
        try:
            await _run_steps(lab, result)
        except (LabError, OSError) as error:
            result.problems.append(str(error))
        await lab.collect(result)
    result.ended = time.time()
    judge(result, options.pre_copy, verified=options.load_place == "guest", load=options.load)
    return result


async def _run_steps(lab: Lab, result: MigrationResult) -> None:
    if not probe_qemu(lab.options.qemu).migration:
        raise LabError(
            f"{lab.options.qemu} cannot migrate vfio-user devices (QEMU {result.qemu.version} without the "
            "project's patches); run: vfu-dev build qemu"
        )
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
    lab.reporter("phase", {"text": "moved; the guest goes on writing on the destination"})
    if lab.options.load_place == "device":
        result.load_status = [await server.command("load-status") for server in lab.source.servers]
    await lab.follow()
    await asyncio.sleep(lab.options.settle_seconds)
    await lab.guest.stop()
    if lab.options.load_place == "device":
        return  # the guest has no journal of what the devices wrote; digests were compared
    lab.reporter("phase", {"text": "the guest reads everything back"})
    result.guest = await lab.guest.verify(
        lambda done, total: lab.reporter("verify", {"compared_bytes": done, "total_bytes": total})
    )


def _why(lab: Lab) -> str | None:
    """Say what kept QEMU from stopping the source, as far as it is known."""
    if lab.convergence is not None:
        return lab.convergence.text
    threshold = lab.samples[-1]["threshold_bytes"] if lab.samples else None
    if lab.options.pre_copy or threshold is None:
        return None
    state = format_size(lab.options.memory_bytes * lab.options.devices)
    return f"without pre-copy up to {state} are left, QEMU's threshold is {format_size(round(threshold))}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
