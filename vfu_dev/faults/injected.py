"""One armed fault: which calls it strikes, and its number of hits."""

from __future__ import annotations

import os
import random

from vfu_dev.errors import AccessError
from vfu_dev.faults.spec import Fault
from vfu_dev.uapi import DeviceState


class InjectedError(AccessError):
    """What a fault with an `error` raises; `fault` is its text. Carries the errno that was asked for."""

    def __init__(self, number: int, fault: str) -> None:
        super().__init__(f"injected fault: {fault}")
        self.errno = number
        self.fault = fault


class ArmedFault:
    """A fault in place.

    Attributes:
        ident: under which it can be cleared.
        calls: number of calls of its operation while it was armed.
        hits: number of calls that it struck.
        seen_bytes: bytes of data that went through its operation; its layer counts them.
        line: whether the device asserted INTx when its layer last heard of it, or when it was armed.
    """

    def __init__(self, ident: int, fault: Fault, *, line: bool = False) -> None:
        self.ident = ident
        self.fault = fault
        self.calls = 0
        self.hits = 0
        self.seen_bytes = 0
        self.line = line
        self.cleared = False
        self.random = random.Random(fault.seed)

    def strikes(self, state: DeviceState, target: DeviceState | None, here: bool) -> bool:
        """Count a call and return whether the fault strikes it.

        Args:
            state: the device's migration state.
            target: where a transition leads.
            here: whatever else has to hold, such as the place in the stream.
        """
        fault = self.fault
        self.calls += 1
        early = self.calls <= fault.after or self.seen_bytes < fault.after_bytes
        # Drawn for every call: which calls are struck depends on nothing but the seed.
        drawn = self.random.random() < fault.rate
        if (
            early
            or not drawn
            or not here
            or (fault.count is not None and self.hits >= fault.count)
            or (fault.state is not None and fault.state is not state)
            or (fault.origin is not None and fault.origin is not state)
            or (fault.target is not None and fault.target is not target)
            or not self.triggered
        ):
            return False
        self.hits += 1
        return True

    @property
    def triggered(self) -> bool:
        """Whether the trigger file exists, if there is to be one."""
        return self.fault.trigger is None or os.path.exists(self.fault.trigger)

    def error(self) -> InjectedError:
        """Return what to raise."""
        return InjectedError(self.fault.error_number, str(self.fault))

    def as_dict(self) -> dict[str, object]:
        """Return it as the control socket shows it."""
        return {
            "id": self.ident,
            "fault": str(self.fault),
            "calls": self.calls,
            "hits": self.hits,
        }
