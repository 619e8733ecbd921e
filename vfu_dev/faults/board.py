"""Puts faults around a served device, and removes them again."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from vfu_dev.device import Device
from vfu_dev.errors import ConfigError
from vfu_dev.faults.injected import ArmedFault, InjectedError
from vfu_dev.faults.layers import LAYERS, Reach
from vfu_dev.faults.spec import OPERATIONS, Fault
from vfu_dev.uapi import DeviceState

logger = logging.getLogger(__name__)

MAX_ARMED = 64

T = TypeVar("T")


class FaultHost(Protocol):
    """The server around the device: what a fault may do beside failing a call."""

    def hold(self, seconds: float | None, over: Callable[[], bool]) -> None:
        """Serve no client for the given seconds (None: no limit) or until `over()`; commands are answered."""

    def disconnect(self) -> None:
        """Close the client's connection."""

    def fail_device(self, reason: str) -> None:
        """Take the device to ERROR."""

    def write_unlogged(self, address: int, data: memoryview | bytes) -> None:
        """Write to guest memory past the DMA log; Raises: AccessError, as `Bus.write`."""


@dataclass(frozen=True)
class Seam(Generic[T]):
    """One interface of the served device that faults can be put around, and how to reach its caller.

    Attributes:
        operations: which ones go through it.
        base: what serves them.
        put: has the caller use another one from its next call on: the outermost layer, or `base` again.
        bar: whose accesses go through it; None for what has nothing to do with one.
    """

    operations: tuple[str, ...]
    base: T
    put: Callable[[T], None]
    bar: int | None = None

    def has(self, fault: Fault) -> bool:
        """Return whether `fault` stands around this one."""
        return fault.op in self.operations and fault.bar in (None, self.bar)


class FaultBoard:
    """The faults of one served device.

    Attributes:
        armed: the faults in place, by number.
        injected: number of hits since the server started, by operation.
    """

    def __init__(self, device: Device, host: FaultHost, seams: Sequence[Seam[Any]]) -> None:
        self.armed: dict[int, ArmedFault] = {}
        self.injected = dict.fromkeys(OPERATIONS, 0)
        self._device = device
        self._host = host
        self._seams = seams
        self._last = 0
        self._reach = Reach(device.migration, self._strikes, self._act, host.write_unlogged)

    def arm(self, fault: Fault) -> int:
        """Put `fault` in place, around those that are there; returns the number to clear it by.

        Raises: ConfigError: the device has no such operation, or too many faults are armed.
        """
        if not any(seam.has(fault) for seam in self._seams):
            missing = "not with this libvfio-user" if fault.bar is None else f"there is no BAR{fault.bar}"
            raise ConfigError(f"fault: op {fault.op}: {missing}")
        if len(self.armed) >= MAX_ARMED:
            raise ConfigError(f"fault: {MAX_ARMED} are armed, which is the limit")
        self._last += 1
        # INTx that is up already has risen: the next change of its causes is no interrupt to lose.
        line = self._device.interrupts.is_line_up
        self.armed[self._last] = ArmedFault(self._last, fault, line=line)
        self._place(fault)
        logger.info("%s: fault %d armed: %s", self._device.name, self._last, fault)
        return self._last

    def clear(self, ident: int | None = None) -> int:
        """Take away one fault, or all; returns how many. What it holds up goes on.

        Raises: ConfigError: no such number.
        """
        if ident is not None and ident not in self.armed:
            known = ", ".join(str(number) for number in self.armed) or "none"
            raise ConfigError(f"fault: clear {ident}: not armed; there are: {known}")
        gone = [ident] if ident is not None else list(self.armed)
        for number in gone:
            one = self.armed.pop(number)
            one.cleared = True
            self._place(one.fault)
            logger.info("%s: fault %d cleared after %d hits", self._device.name, number, one.hits)
        return len(gone)

    def listed(self) -> list[dict[str, object]]:
        """Return all that are armed: id, fault, calls, hits."""
        return [one.as_dict() for one in self.armed.values()]

    def command(self, request: dict[str, Any]) -> dict[str, object]:
        """Serve `fault` of the control socket: `{"fault": {...} or text}` or `{"clear": ID or "all"}`.

        Raises: ConfigError: it is neither.
        """
        if ("fault" in request) == ("clear" in request):
            raise ConfigError('fault: expected either "fault" or "clear"')
        if "clear" in request:
            which = request["clear"]
            if which == "all":
                return {"cleared": self.clear()}
            if not isinstance(which, int) or isinstance(which, bool):
                raise ConfigError(f'fault: clear {which!r}: expected the number of a fault, or "all"')
            return {"cleared": self.clear(which)}
        given = request["fault"]
        return {"id": self.arm(Fault.parse(given) if isinstance(given, str) else Fault.from_dict(given))}

    def _place(self, changed: Fault) -> None:
        """Stack the layers anew where a fault came or went; the one armed first is innermost."""
        for seam in self._seams:
            if not seam.has(changed):
                continue
            here = [one for one in self.armed.values() if seam.has(one.fault)]
            # What goes past the log stands in for the bus itself: all others are around it.
            here.sort(key=lambda one: not one.fault.unlogged)
            outer = seam.base
            for one in here:
                outer = LAYERS[one.fault.op](one, self._reach, outer)
            seam.put(outer)

    # --- what layers call -----------------------------------------------------------------------------------

    def _strikes(self, one: ArmedFault, here: bool = True, target: DeviceState | None = None) -> bool:
        if not one.strikes(self._device.migration.state, target, here):
            return False
        self.injected[one.fault.op] += 1
        # A fault may strike in every access: only the first hit is logged, the others are counted.
        level = logging.INFO if one.hits == 1 else logging.DEBUG
        logger.log(level, "%s: fault %d happens: %s", self._device.name, one.ident, one.fault)
        return True

    def _act(self, one: ArmedFault) -> None:
        """Do what a fault does that changes no content; returns when the operation goes on."""
        fault = one.fault
        match fault.action:
            case "error":
                raise one.error()
            case "delay":
                self._host.hold(fault.delay, lambda: one.cleared)
            case "stall":
                self._host.hold(None, lambda: one.cleared or not one.triggered)
            case "disconnect":
                self._host.disconnect()
                raise InjectedError(errno.ECONNRESET, str(fault))
            case "broken":
                self._host.fail_device(f"injected fault: {fault}")
                raise one.error()
            case "exit":
                logger.warning("%s: fault %d: the server ends", self._device.name, one.ident)
                logging.shutdown()
                os._exit(fault.exit or 0)
