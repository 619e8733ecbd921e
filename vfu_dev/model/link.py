"""The model's link: its bandwidth, and the rule by which the client stops the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS, WINDOW_SECONDS, threshold_bytes
from vfu_dev.errors import ConfigError
from vfu_dev.migration.forecast import OVERHEAD_SECONDS
from vfu_dev.sizes import format_size

# What QEMU reads of a device at once: VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE, hw/vfio/migration.c of 10.2.2.
QEMU_BLOCK_BYTES = 1 << 20
# So its bandwidth for device state is a multiple of this, bytes a second: see `qemu_bandwidth`.
QEMU_STEP_BYTES = 10 * QEMU_BLOCK_BYTES
# What `vfu-dev migrate` does (its servers' limit for a transfer); on a slow link a window's worth at most.
MIGRATOR_TRANSFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Link:
    """Bandwidths of the state's way, and the rule by which a client stops the device.

    Attributes:
        bandwidth: bytes a second while the device runs.
        downtime_limit_seconds: what may be left is bandwidth times this.
        switchover_bandwidth: bytes a second that the client uses for its decision, instead of the bandwidth
            that it measures; 0: none.
        stop_bandwidth: bytes a second once the device is stopped; 0: `bandwidth`. QEMU lifts its limit then.
        pass_seconds: what the start of a pass costs beside sending.
        overhead_seconds: of the downtime, beside sending what is left.
        initial_first: stop only when all initial data is sent: switchover-ack, and this project's migrator.
        burst_seconds: the client sends what its bandwidth allows in this time at once, then pauses for the
            rest of it. It decides at the end of a burst, when less is left than with an even stream: half of
            a burst on average. QEMU: 0.1.
        drain_bytes: bytes in flight when the client decides to stop. While they pass the client reads nothing
            and the device goes on; what it writes meanwhile must fit as well. The migrator: one transfer.
    """

    bandwidth: float
    downtime_limit_seconds: float = DOWNTIME_LIMIT_SECONDS
    switchover_bandwidth: float = 0.0
    stop_bandwidth: float = 0.0
    pass_seconds: float = 0.0
    overhead_seconds: float = OVERHEAD_SECONDS
    initial_first: bool = False
    burst_seconds: float = 0.0
    drain_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0:
            raise ConfigError(f"bandwidth {self.bandwidth:g}: expected bytes a second, above 0")

    @property
    def threshold_bytes(self) -> float:
        """What may be left when the device is stopped."""
        return threshold_bytes(self.switchover_bandwidth or self.bandwidth, self.downtime_limit_seconds)


def qemu_bandwidth(max_bandwidth: float) -> float:
    """Return what QEMU really sends of device state, bytes a second, when `max-bandwidth` is set to this.

    It reads blocks of 1 MiB and checks its limit between two of them; every 0.1 s the count starts anew, and
    an excess is forgotten (migration/migration.c, hw/vfio/migration.c of 10.2.2). So it sends whole blocks,
    at least one each 0.1 s: the rate is a multiple of 10 MiB/s, and at least that.
    """
    return float(math.ceil(max_bandwidth / QEMU_STEP_BYTES) * QEMU_STEP_BYTES)


def steps_note(max_bandwidth: float) -> str:
    """Return in brackets why QEMU sends more than `max-bandwidth`; nothing where that is a step."""
    if qemu_bandwidth(max_bandwidth) == max_bandwidth:
        return ""
    asked, step = format_size(max_bandwidth), format_size(QEMU_STEP_BYTES)
    return f" (max-bandwidth {asked}/s, in QEMU's steps of {step}/s)"


def qemu_link(max_bandwidth: float, **more: Any) -> Link:
    """Return QEMU as a `Link`, with its `max-bandwidth`; `more` as there."""
    return Link(qemu_bandwidth(max_bandwidth), burst_seconds=WINDOW_SECONDS, **more)


def migrator_link(bandwidth: float, **more: Any) -> Link:
    """Return `vfu-dev migrate` as a `Link`."""
    drain = min(MIGRATOR_TRANSFER_BYTES, bandwidth * WINDOW_SECONDS)
    return Link(bandwidth, initial_first=True, drain_bytes=drain, **more)
