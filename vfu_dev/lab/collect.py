"""After a move: what servers, QEMUs and traces say, as one `MigrationResult`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from vfu_dev.client.digest import AUDIT_POLL_SECONDS, audit_over
from vfu_dev.errors import LabError
from vfu_dev.lab.result import DeviceResult, MigrationResult
from vfu_dev.vm.servers import DeviceServer
from vfu_dev.vm.trace import states_set

if TYPE_CHECKING:
    from vfu_dev.lab.rig import Lab

# How long the source's audit may take once the device is stopped; 1 GiB takes 0.2 s of an idle machine.
AUDIT_SECONDS = 120.0

FINAL_STATES = ("completed", "failed", "cancelled")


async def collect(lab: Lab, result: MigrationResult) -> None:
    """Take what there is into `result`; parts that are gone stay empty and are among its problems."""
    await lab.watch()
    for index, (source, destination) in enumerate(
        zip(lab.source.servers, lab.destination.servers, strict=True)
    ):
        device = DeviceResult(name=f"vfu{index}")
        for server, read in ((source, device.read_source), (destination, device.read_destination)):
            try:
                status = await _final_status(server)
                read(status)
                if not audit_over(status):
                    state = status.get("state")
                    problem = f"in {state} its audit is not over after {AUDIT_SECONDS:g} s"
                    result.problems.append(f"server {server.name}: {problem}")
            except LabError as error:
                result.problems.append(str(error))
        device.read_figures(lab.snapshots[index], lab.server_samples[index])
        result.devices.append(device)
    if lab.convergence is not None:
        result.convergence = lab.convergence.to_json()
    await _collect_qemu(lab, result)
    result.samples = lab.samples
    if lab.snapshots and (snapshot := lab.snapshots[0]) is not None:
        result.versions["libvfio-user"] = str(snapshot.library.get("api", "unknown"))


async def _final_status(server: DeviceServer) -> dict[str, Any]:
    """Return the status once the audit is over, or after AUDIT_SECONDS as it is.

    Before that the digest is that of what was sent, not of what was in memory.

    Raises: LabError: the server is gone.
    """
    deadline = time.monotonic() + AUDIT_SECONDS
    while not audit_over(status := await server.status()) and time.monotonic() < deadline:
        await asyncio.sleep(AUDIT_POLL_SECONDS)
    return status


async def _collect_qemu(lab: Lab, result: MigrationResult) -> None:
    out, source, destination = result.qemu, lab.source.qemu, lab.destination.qemu
    with contextlib.suppress(LabError):
        active = [row["qemu"] for row in lab.samples if row["status"] not in FINAL_STATES]
        out.read_migration(await source.migration(), active[-1] if active else {})
        out.run_state_source = await source.run_state()
        out.capabilities = [
            entry["capability"]
            for entry in await source.execute("query-migrate-capabilities")
            if entry["state"]
        ]
    with contextlib.suppress(LabError):
        out.run_state_destination = await destination.run_state()
    out.command_line_source = source.process.argv
    out.command_line_destination = destination.process.argv
    out.events_source, out.events_destination = source.events, destination.events
    # A source that was a destination before logged that too.
    source_trace = [event for event in source.trace() if event.time is None or event.time >= lab.roles_since]
    destination_trace = destination.trace()
    out.trace_source = [event.to_json() for event in source_trace]
    out.trace_destination = [event.to_json() for event in destination_trace]
    out.states_source = states_set(source_trace)
    out.states_destination = states_set(destination_trace)
