"""A lie: one function that changes one honest reply, and when it applies.

The phase of a lie says what a client has to do to get it: `attach` (connect and realize the device), `run`
(the guest touches BARs, resets, maps memory), `save` (migrate away), `resume` (migrate to here).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.hostile.device import Device
from vfu_dev.hostile.message import COMMANDS, FEATURES, Reply, Request
from vfu_dev.uapi import VFIO_USER_ERROR as ERROR

PHASES = ("attach", "run", "save", "resume")
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
GIB = 1 << 30

Change = Callable[[Device, Request, Reply], None]


@dataclass(frozen=True)
class Lie:
    """One named lie: applies to `command` (None: any) and, of DEVICE_FEATURE, to `feature` (0: any)."""

    name: str
    phase: str
    meaning: str
    command: int | None
    feature: int
    change: Change
    on_errors: bool = False  # told even where the honest answer is an error
    state: int | None = None  # only of a SET to this migration state

    def matches(self, request: Request, reply: Reply) -> bool:
        """Whether this is a reply the lie is about."""
        if self.command is not None and request.command != self.command:
            return False
        if self.feature and request.feature != self.feature:
            return False
        if self.state is not None and request.payload[8:12] != struct.pack("<I", self.state):
            return False
        return self.on_errors or not reply.flags & ERROR


class Liar:
    """Applies one lie from the `after`-th match on, `times` times, while `arm_file` exists.

    Attributes: told: number of replies with the lie.
    """

    def __init__(
        self,
        device: Device,
        lie: Lie | None,
        after: int = 0,
        times: int | None = None,
        arm_file: str | None = None,
    ) -> None:
        self.device = device
        if lie is not None and lie.name.startswith("window-"):
            device.offers_window = True
        self.lie = lie
        self.after = after
        self.times = times
        self.arm_file = Path(arm_file) if arm_file else None
        self.told = 0

    def __call__(self, request: Request, reply: Reply) -> None:
        """Change `reply` if it is time to."""
        if self.lie is None or not self.lie.matches(request, reply):
            return
        if self.arm_file is not None and not self.arm_file.exists():
            return
        if self.after > 0:
            self.after -= 1
            return
        if self.times is not None:
            if self.times <= 0:
                return
            self.times -= 1
        before = (reply.encode(), len(reply.fds))
        self.lie.change(self.device, request, reply)
        # A lie about one region is asked for every region's answer: what it did not change was true.
        if (reply.encode(), len(reply.fds)) != before or _disturbs(reply):
            self.told += 1


def _disturbs(reply: Reply) -> bool:
    return bool(
        reply.before or reply.after or reply.trickle or reply.delay_seconds or reply.silent or reply.close
    )


LIES: dict[str, Lie] = {}


def add(
    name: str,
    phase: str,
    meaning: str,
    command: str | None,
    change: Change,
    feature: str = "",
    **more: object,
) -> None:
    """Enter a lie into the table; `more`: further fields of `Lie`."""
    number = COMMANDS[command] if command else None
    lie = Lie(name, phase, meaning, number, FEATURES.get(feature, 0), change, **more)  # type: ignore[arg-type]
    if LIES.setdefault(name, lie) is not lie:
        raise ValueError(f"two lies are called {name}")


def put(layout: str, offset: int, *values: int) -> Change:
    """Overwrite bytes of the payload."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        needed = offset + struct.calcsize(layout) - len(reply.payload)
        reply.payload += bytes(max(0, needed))
        struct.pack_into(layout, reply.payload, offset, *values)

    return change


def payload(data: bytes) -> Change:
    """Replace the payload."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        reply.payload = bytearray(data)

    return change


def set_fields(**fields: object) -> Change:
    """Set fields of the reply."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        for name, value in fields.items():
            setattr(reply, name, value)

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(device: Device, request: Request, reply: Reply) -> None:
        for one in changes:
            one(device, request, reply)

    return change
