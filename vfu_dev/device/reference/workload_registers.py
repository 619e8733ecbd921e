"""A load that the guest sets by registers: all of it migrates, and it goes on at the destination.

Write n at the destination is what write n would have been at the source: the number is in a register.
"""

from __future__ import annotations

from vfu_dev.device.base import Device
from vfu_dev.device.reference.layout import (
    CTRL_PAGES,
    CTRL_RUN,
    FIELDS,
    MILLION,
    LoadPattern,
    LoadStatus,
)
from vfu_dev.device.reference.workload import WorkloadRates, WorkloadRun, rates_of
from vfu_dev.device.region import Region
from vfu_dev.device.registers import Registers
from vfu_dev.errors import ConfigError
from vfu_dev.migration import RegisterBlock
from vfu_dev.workload import Workload

_MASK = (1 << 64) - 1
# What a load consists of: when one of these changes, it is another load that goes on with the same number.
_PARAMETERS = tuple(f.name for f in FIELDS if f.name.startswith("load_") and f.access == "rw")


class RegisterWorkload:
    """The worker behind the registers `load_*` of a `device`; it writes to `region`."""

    def __init__(self, device: Device, registers: Registers, region: Region) -> None:
        self._device = device
        self._registers = registers
        self._memory = region.memory
        self._run: WorkloadRun | None = None
        self._parameters: tuple[int, ...] = ()
        self._first = self._first_missed = 0
        self._missed = 0  # by runs before, whatever the register says
        # What load_status says, for the loop, which asks at every access of the guest.
        self._writing = False

    def write_ctrl(self, value: int) -> None:
        """Begin or stop."""
        registers = self._registers
        self._end()
        self._writing = bool(value & CTRL_RUN)
        if self._writing:
            registers["load_count"] = registers["load_missed"] = 0
            registers["load_status"] = LoadStatus.WRITING
            self._begin()
        else:
            registers["load_status"] = LoadStatus.STOPPED

    def spec(self) -> Workload:
        """Return the load that the registers describe.

        Raises: ConfigError: they are invalid.
        """
        registers = self._registers
        try:
            pattern = LoadPattern(registers["load_pattern"])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        rate = registers["load_rate"]
        by_pages = bool(registers["load_ctrl"] & CTRL_PAGES)
        return Workload(
            pattern.name.lower(),
            rate_bytes=None if by_pages else rate,
            rate_pages=rate if by_pages else None,
            write_bytes=registers["load_write_bytes"],
            seed=registers["load_seed"],
            hot_fraction=registers["load_hot_fraction"] / MILLION,
            hot_share=registers["load_hot_share"] / MILLION,
            zipf_exponent=registers["load_zipf_exponent"] / MILLION,
        )

    def _read_parameters(self) -> tuple[int, ...]:
        return tuple(self._registers[name] for name in _PARAMETERS)

    def _begin(self) -> None:
        """Make a run of the load in the registers, from the write number in the registers."""
        registers = self._registers
        self._end()
        self._parameters = self._read_parameters()
        self._first, self._first_missed = registers["load_count"], registers["load_missed"]
        try:
            self._run = WorkloadRun(self.spec(), self._memory, self._device.migration, self._first)
        except ConfigError:
            self._writing = False
            registers["load_ctrl"] = 0
            registers["load_status"] = LoadStatus.BAD_LOAD

    def due(self) -> float | None:
        """See `Worker`."""
        if not self._writing:
            return None
        return 0.0 if self._run is None else self._run.due()

    def advance(self, budget_seconds: float) -> None:
        """Make the writes that are due."""
        registers = self._registers
        run = self._run
        # Another load, or another number: the guest wrote a register, or the state arrived by migration.
        known = run is not None and registers["load_count"] == (self._first + run.writes) & _MASK
        if not known or self._parameters != self._read_parameters():
            self._begin()
            run = self._run
        if run is None:
            return
        run.advance(budget_seconds)
        registers["load_count"] = (self._first + run.writes) & _MASK
        registers["load_missed"] = (self._first_missed + run.missed) & _MASK

    def rates(self) -> WorkloadRates:
        """See `MakesWorkload`."""
        return rates_of(self._run, self._missed)

    def _end(self) -> None:
        if self._run is not None:
            self._missed += self._run.missed
        self._run = None

    def reset(self) -> None:
        """Stop; registers were reset before."""
        self._end()
        self._writing = False

    def resumed(self) -> None:
        """Follow a completed migration into here: the registers are those of the source."""
        self._end()
        self._writing = self._registers["load_status"] == LoadStatus.WRITING

    def block(self) -> RegisterBlock | None:
        """Nothing migrates beside the registers."""
        return None
