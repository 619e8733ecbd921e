"""A load made by the program in a guest, commanded over the guest's serial line."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from vfu_dev.client.commanded import POLL_SECONDS, LoadReporter
from vfu_dev.client.stop import Stop, deadline_of
from vfu_dev.vm.guest_line import GuestError, GuestLine, Transport
from vfu_dev.workload import PAGE_PATTERNS, Program, Workload, WorkloadFigures
from vfu_dev.workload.figures import KEEPS_UP, carried_part


async def run_in_guest(
    line_socket: Path,
    spec: Workload,
    seconds: float | None,
    stop: Stop,
    reporter: LoadReporter,
    via: Transport = "mmio",
) -> WorkloadFigures:
    """Have the guest behind `line_socket` make the load on each of its devices, and report on it.

    Raises: GuestError: no such guest, or it refuses.
    """
    line = GuestLine()
    try:
        await line.connect(line_socket)
    except OSError as error:
        raise GuestError(
            f"no guest at {line_socket}: {error.strerror}; expected the socket of its serial port "
            "(vfu-dev docs load)"
        ) from error
    try:
        status = await line.command("status")
        if not status["devices"]:
            raise GuestError("the guest found no device")
        asked = Program(spec, status["memory_bytes"], status["page_bytes"]).asked_rate_bytes
        asked *= status["devices"]
        before = (0.0, 0)
        # What a steady load owes follows from the time; what others owe only the guest knows.
        is_steady = spec.pattern in PAGE_PATTERNS and spec.burst is None
        await line.start_load(spec, status["page_bytes"], via=via)
        deadline = deadline_of(seconds)
        try:
            while time.monotonic() < deadline and not stop.asked:
                await asyncio.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
                status = await line.command("status")
                reporter(_guest_figures(status, asked, before, is_steady))
                before = status["elapsed_ns"] / 1e9, status["written_bytes"]
        finally:
            status = await line.command("stop")
        return _guest_figures(status, asked, before, is_steady)
    finally:
        await line.close()


def _guest_figures(
    status: dict[str, Any], asked: float, before: tuple[float, int], is_steady: bool
) -> WorkloadFigures:
    """Return what a guest says in our words; `before` is when it last did, and the bytes then."""
    seconds, written = status["elapsed_ns"] / 1e9, status["written_bytes"]
    carried = carried_part(status["writes"], status["missed_writes"])
    if carried is not None and is_steady and asked * seconds > written:
        carried = min(carried, written / (asked * seconds))
    return WorkloadFigures(
        asked_rate_bytes=asked,
        reached_rate_bytes=written / seconds if seconds else 0.0,
        recent_rate_bytes=(written - before[1]) / max(seconds - before[0], 1e-9),
        writes=status["writes"],
        written_bytes=written,
        missed_writes=status["missed_writes"],
        carried=carried,
        keeps_up=carried is None or carried >= KEEPS_UP,
        seconds=seconds,
        quiet_seconds=0.0,
    )
