"""The load that an operator sets, on any device that is served.

It belongs to this process: it survives resets and clients, and does not migrate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from vfu_dev.device.reference.workload import WorkloadRates, WorkloadRun, rates_of
from vfu_dev.errors import ConfigError, shown
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import Migration, RegisterBlock
from vfu_dev.workload import Program, Workload


class OperatorWorkload:
    """The load that the control socket sets: a worker of any device with memories."""

    def __init__(self, memories: Callable[[], Sequence[DeviceMemory]], migration: Migration) -> None:
        self._memories = memories
        self._migration = migration
        self._run: WorkloadRun | None = None
        self._until: float | None = None
        self._missed = 0  # by those before
        self._last: dict[str, object] = {"running": False, "load": None, "memory": None}

    def memory(self, name: str | None = None) -> DeviceMemory:
        """Return the memory of that name, or the first one.

        Raises: ConfigError: there is none.
        """
        memories = {each.name: each for each in self._memories()}
        if not memories:
            raise ConfigError("this device has no memory to write to")
        if name is None:
            return next(iter(memories.values()))
        if name not in memories:
            raise ConfigError(f"memory {shown(name)}: expected one of {', '.join(memories)}")
        return memories[name]

    def start(
        self,
        spec: Workload,
        memory: str | None = None,
        seconds: float | None = None,
        program: Program | None = None,
    ) -> None:
        """Begin `spec` on the memory of that name, or the first one; it replaces what was running.

        Args: seconds: stop after this time; None for never.
              program: see `WorkloadRun`.
        Raises: ConfigError: no such memory, or it is too small; what was running goes on.
        """
        run = WorkloadRun(spec, self.memory(memory), self._migration, program=program)
        self.stop()
        self._run = run
        self._until = None if seconds is None else time.monotonic() + seconds

    def stop(self) -> None:
        """Stop writing; the figures stay."""
        if self._run is not None:
            self._run.settle()
            self._missed += self._run.missed
            self._last = self.status() | {"running": False}
            self._run = None

    def status(self) -> dict[str, object]:
        """Return the load and its figures; the last one's when none is running."""
        run = self._run
        if run is None:
            return dict(self._last)
        return {
            "running": True,
            "load": run.spec.to_dict(),
            "memory": run.memory.name,
            **asdict(run.figures()),
        }

    def rates(self) -> WorkloadRates:
        """See `MakesWorkload`."""
        return rates_of(self._run, self._missed)

    @property
    def written_bytes(self) -> int:
        """Bytes that the present load wrote."""
        return 0 if self._run is None else self._run.written_bytes

    def due(self) -> float | None:
        """See `Worker`."""
        if self._run is None:
            return None
        due = self._run.due()
        if self._until is not None:
            left = max(0.0, self._until - time.monotonic())
            return left if due is None else min(due, left)
        return due

    def advance(self, budget_seconds: float) -> None:
        """Write what is due, or stop when it is time."""
        if self._run is None:
            return
        if self._until is not None and time.monotonic() >= self._until:
            self.stop()
            return
        self._run.advance(budget_seconds)

    def reset(self) -> None:
        """Go on: the load is the operator's, not the guest's."""

    def block(self) -> RegisterBlock | None:
        """Nothing of it migrates."""
        return None
