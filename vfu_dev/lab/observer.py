"""Samples both sides of a migration: QEMU's figures, and the measurements of the devices' servers.

An `ObservedMove` starts nothing. `vfu_dev.lab.lab.Lab` is one that owns what is observed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from vfu_dev.client.digest import AUDIT_POLL_SECONDS, audit_over
from vfu_dev.errors import LabError
from vfu_dev.figures import Sample, Snapshot
from vfu_dev.lab.convergence import Convergence, Limits, assess, qemu_threshold_bytes
from vfu_dev.lab.host import Fetched, brief
from vfu_dev.lab.result import FINAL_STATES, DeviceResult, MigrationResult
from vfu_dev.vm.monitor import Monitor
from vfu_dev.vm.process import PATIENCE_SECONDS
from vfu_dev.vm.servers import ControlledServer

# Seconds between two samples of both sides while a migration runs. QEMU itself decides every 100 ms.
SAMPLE_SECONDS = 0.05
# Samples grow fewer as a migration grows longer: about this many for each factor of e in time.
SAMPLES_KEPT = 400

# How long QEMU's answer is waited for at the end of a wait, so that the last sample is of the end.
ANSWER_SECONDS = 1.0

T = TypeVar("T")
MoveEvent = Literal["phase", "sample", "convergence", "verify"]
MoveReporter = Callable[[MoveEvent, dict[str, Any]], None]


# How long the source's audit may take once the device is stopped; 1 GiB takes 0.2 s of an idle machine.
AUDIT_SECONDS = 120.0


async def _final_status(server: ControlledServer, *, leaves: bool) -> dict[str, Any]:
    """Return the status once the audit is over, or after AUDIT_SECONDS as it is.

    Before that the digest is that of what was sent, not of what was in memory.

    Args: leaves: QEMU takes the device out of PRE_COPY or STOP_COPY; it may say "failed", or "completed",
              before it does.
    Raises: LabError: the server is gone.
    """

    def is_final(status: dict[str, Any]) -> bool:
        return audit_over(status) and not (leaves and "COPY" in str(status.get("state")))

    deadline = time.monotonic() + AUDIT_SECONDS
    while not is_final(status := await server.status()) and time.monotonic() < deadline:
        await asyncio.sleep(AUDIT_POLL_SECONDS)
    return status


# QEMU's run state of a VM that it has stopped to complete a migration. It leaves that after it has said
# "completed" or "failed": QEMU 10.2, migration/migration.c, migration_iteration_finish.
FINISHING = "finish-migrate"


async def _run_state(qemu: Monitor, wanted: Callable[[str], bool], timeout_seconds: float) -> str:
    """Return the VM's run state once it is wanted, or after that time as it is. Raises: LabError."""
    deadline = time.monotonic() + timeout_seconds
    while not wanted(state := await qemu.run_state()) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return state


def remaining_bytes(row: Mapping[str, Any]) -> float:
    """Return what, in that sample, would still have to be sent if nothing was written any more."""
    left = row["qemu"].get("ram", {}).get("remaining") or 0
    devices = sum((one.get("initial_bytes") or 0) + (one.get("dirty_bytes") or 0) for one in row["source"])
    return float(left + devices)


class TimeLimitError(LabError):
    """The expected state or event did not come in time."""


class Side(Protocol):
    """One host, as far as it is observed."""

    @property
    def qemu(self) -> Monitor:
        """Its QEMU."""

    @property
    def servers(self) -> Sequence[ControlledServer]:
        """The servers of its devices."""

    async def fetch_figures(self) -> list[Fetched]:
        """Return what each server measured since the last time."""


class ObservedMove(ABC):
    """Samples a migration from `source` to `destination`, set by the subclass, and keeps the samples.

    Attributes:
        samples: in order; see `sample`.
        cancelled: whether `cancel` was called for this move.
        snapshots, server_samples: of each of the source's servers: its figures, and all samples of this move.
        timeout_seconds: limit of a wait, unless the call gives another.
    """

    source: Side
    destination: Side
    timeout_seconds: float

    def __init__(self, devices: int, reporter: MoveReporter | None) -> None:
        self.samples: list[dict[str, Any]] = []
        self.cancelled = False
        self.convergence: Convergence | None = None
        # When the sides got their roles (Unix time); 0.0: they never had others.
        self.roles_since = 0.0
        self.snapshots: list[Snapshot | None] = [None] * devices
        self.server_samples: list[list[Sample]] = [[] for _ in range(devices)]
        self.reporter: MoveReporter = reporter or (lambda what, data: None)
        self._deadline: float | None = None  # of the wait that samples

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Any]:
        """QEMU's migration parameters, underscores for hyphens."""

    @property
    @abstractmethod
    def downtime_limit_ms(self) -> int:
        """QEMU's downtime-limit."""

    async def sample(self) -> dict[str, Any]:
        """Sample QEMU and all servers, and keep the sample."""
        now = time.time()
        migration = await self.in_time(self.source.qemu.migration())
        row: dict[str, Any] = {"time": now, "status": migration.get("status", "none"), "qemu": migration}
        row["source"], destination = await asyncio.gather(
            self.fetch_figures(), self.destination.fetch_figures()
        )
        row["destination"] = [brief(fetched) for fetched in destination]
        row["threshold_bytes"] = qemu_threshold_bytes(self.parameters, self.downtime_limit_ms, row["qemu"])
        self.samples.append(row)
        self._assess(row)
        self.reporter("sample", row)
        return row

    async def in_time(self, answer: Awaitable[T]) -> T:
        """Return the source's answer.

        It is behind all events that were not read yet. A QEMU that makes pass after pass sends them faster
        than they are read, so an answer may come after the limit of a wait.

        Raises: TimeoutError: it did not come before the limit, nor within ANSWER_SECONDS.
        """
        if self._deadline is None:
            return await answer
        async with asyncio.timeout(max(ANSWER_SECONDS, self._deadline - time.monotonic())):
            return await answer

    async def fetch_figures(self) -> list[dict[str, Any]]:
        """Fetch what the source's servers measured since the last time; one that is gone stays as it was.

        Returns: what a sample keeps of each.
        """
        found = await self.source.fetch_figures()
        for index, fetched in enumerate(found):
            if not isinstance(fetched, LabError):
                self.snapshots[index], samples = fetched
                self.server_samples[index] += samples
        return [brief(fetched) for fetched in found]

    def _assess(self, row: dict[str, Any]) -> None:
        devices = [snapshot for snapshot in self.snapshots if snapshot is not None]
        if len(devices) == len(self.snapshots) and all("PRE_COPY" in device.state for device in devices):
            self.convergence = assess(
                [device.forecast for device in devices],
                row["qemu"],
                row["threshold_bytes"],
                Limits.of(self.parameters, self.downtime_limit_ms),
            )
            self.reporter("convergence", self.convergence.to_json())

    async def wait_for(
        self, condition: Callable[[dict[str, Any]], bool], what: str, timeout_seconds: float | None = None
    ) -> dict[str, Any]:
        """Sample until `condition(row)` holds and return that row.

        Raises: TimeLimitError: not within the time. LabError: the source's QEMU ended.
        """
        limit = timeout_seconds if timeout_seconds is not None else self.timeout_seconds
        began = time.monotonic()
        deadline = began + limit
        while True:
            self._deadline = deadline
            try:
                row = await self.sample()
            except TimeoutError as error:
                raise TimeLimitError(f"{what}: not within {limit:g} s; QEMU did not answer") from error
            finally:
                self._deadline = None
            if condition(row):
                return row
            if time.monotonic() > deadline:
                raise TimeLimitError(f"{what}: not within {limit:g} s; migration is {row['status']!r}")
            pause = max(SAMPLE_SECONDS, (time.monotonic() - began) / SAMPLES_KEPT)
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))

    async def wait_final(self, timeout_seconds: float | None = None) -> dict[str, Any]:
        """Wait until the migration ends in any way and return `query-migrate`."""
        row = await self.wait_for(
            lambda r: r["status"] in FINAL_STATES, "end of the migration", timeout_seconds
        )
        reply: dict[str, Any] = row["qemu"]
        return reply

    async def cancel(self) -> None:
        """Cancel the migration and wait for its end, which may be another: it may just be completing.

        QEMU's answer to the cancel may come late, as every answer (`in_time`). The end is what counts, so
        after ANSWER_SECONDS nobody waits for the answer any more.

        Raises: TimeLimitError: it does not end. LabError: QEMU refused, or ended.
        """
        self.cancelled = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await self.source.qemu.execute("migrate_cancel")
        await self.wait_final(PATIENCE_SECONDS)

    async def wait_running(self, qemu: Monitor, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until the VM of `qemu` runs. Raises: LabError, ProcessError."""
        state = await _run_state(qemu, lambda state: state == "running", timeout_seconds)
        if state != "running":
            raise LabError(f"{qemu.name}: the VM is {state!r}, not running, after {timeout_seconds:g} s")

    async def forget(self) -> None:
        """Drop what was sampled so far, here and on the source's servers: it is not of the next move."""
        self.samples, self.convergence, self.cancelled = [], None, False
        await self.fetch_figures()
        self.server_samples = [[] for _ in self.source.servers]

    async def collect(self, result: MigrationResult) -> None:
        """Take what there is into `result`; parts that are gone stay empty and are among its problems."""
        found: list[tuple[int, DeviceResult]] = []
        ended = bool(self.samples) and self.samples[-1]["status"] in FINAL_STATES
        for index, (source, destination) in enumerate(
            zip(self.source.servers, self.destination.servers, strict=True)
        ):
            if not source.has_control:
                continue
            device = DeviceResult(name=f"vfu{index}")
            for server, read in ((source, device.read_source), (destination, device.read_destination)):
                try:
                    status = await _final_status(server, leaves=ended and server is source)
                    injected = (await server.command("faults"))["injected"]
                    read({**status, "faults": {op: count for op, count in injected.items() if count}})
                    if not audit_over(status):
                        state = status.get("state")
                        problem = f"in {state} its audit is not over after {AUDIT_SECONDS:g} s"
                        result.problems.append(f"server {server.name}: {problem}")
                except LabError as error:
                    result.problems.append(str(error))
            found.append((index, device))
        # Not before: the device's downtime ends when it leaves STOP_COPY.
        await self.fetch_figures()
        for index, device in found:
            device.read_figures(self.snapshots[index], self.server_samples[index])
            result.devices.append(device)
        if self.convergence is not None:
            result.convergence = self.convergence.to_json()
        if ended:
            with contextlib.suppress(LabError):  # it is gone
                await _run_state(self.source.qemu, lambda state: state != FINISHING, PATIENCE_SECONDS)
        await result.qemu.read_hosts(self.source.qemu, self.destination.qemu, self.samples, self.roles_since)
        result.samples = self.samples
        if self.snapshots and (snapshot := self.snapshots[0]) is not None:
            result.versions["libvfio-user"] = str(snapshot.library.get("api", "unknown"))
