"""What a profile's own figures make of a migration: whether it converges, and the downtime they add up to.

Arithmetic on the profile, without a machine: what QEMU, the link and this machine's processors add to the
downtime is not in it. docs/profile-results.md compares it with migrations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vfu_dev.convergence import WINDOW_SECONDS
from vfu_dev.migration.forecast import OVERHEAD_SECONDS
from vfu_dev.profile import Profile
from vfu_dev.profile.model import Calls
from vfu_dev.replay.laws import DirtyLaw, known, stop_copy_length

# What QEMU reads at once where the profile does not say: VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE.
_BLOCK_BYTES = 1 << 20
# The device enters PRE_COPY or RESUMING, or leaves STOP_COPY: no part of the downtime.
_OUTSIDE = ("RUNNING->PRE_COPY", "STOP_COPY->STOP", "RUNNING->RESUMING")


@dataclass(frozen=True)
class ReplayPrediction:
    """One migration of devices that keep to a profile.

    Attributes:
        left_bytes: of all devices when they stop; of a migration that does not converge, the least there was.
        stop_seconds: from PRE_COPY to the stop; the time that was followed, where it does not converge.
        downtime_seconds: None where it does not converge.
    """

    converges: bool
    left_bytes: int
    threshold_bytes: float
    stop_seconds: float
    downtime_seconds: float | None


def predict_replay(
    profile: Profile,
    threshold_bytes: float,
    bandwidth: float = math.inf,
    *,
    devices: int = 1,
    switchover_ack: bool = False,
    parallel: bool = False,
    limit_seconds: float = 60.0,
) -> ReplayPrediction:
    """Return what QEMU's rule makes of a profile, looked at every 0.1 s.

    Args:
        profile: as scaled.
        threshold_bytes: QEMU's: bandwidth of the switchover times downtime limit.
        bandwidth: of PRE_COPY, bytes a second; the devices share it.
        parallel: STOP_COPY is read from all devices at the same time (multifd): they share only what the
            profile's contention says. Changes of state come one after the other in any case.
    """
    law = DirtyLaw(profile)
    initial = int(known(profile.initial.bytes))
    loaded = math.inf if initial else 0.0  # when the destination has the initial data
    seconds, least = 0.0, math.inf
    pre_copy = profile.features.pre_copy is None or profile.features.pre_copy.value
    while True:
        dirty = law.pending(seconds, all_read=not initial)
        length = stop_copy_length(profile, seconds, initial + dirty)
        left = devices * max(initial + dirty, length)
        least = min(least, left)
        if left <= threshold_bytes and (not switchover_ack or seconds >= loaded or not pre_copy):
            break
        if seconds >= limit_seconds:
            return ReplayPrediction(False, int(least), threshold_bytes, seconds, None)
        took = min(initial, _read_in_a_window(profile.reads.initial, bandwidth / devices))
        initial -= int(took)
        law.took(int(min(dirty, _read_in_a_window(profile.reads.dirty, bandwidth / devices) - took)))
        seconds += WINDOW_SECONDS
        if not initial and loaded == math.inf:
            loaded = seconds + known(profile.loading.initial_seconds)
    carried = length if profile.stop_copy.carried_bytes is None else profile.stop_copy.carried_bytes.value
    loading = known(profile.loading.initial_seconds)
    still = loading if loaded == math.inf else max(0.0, loaded - seconds)
    reads = carried * _seconds_per_byte(profile.reads.stop_copy)
    part = known(profile.contention.part) if profile.contention.resource else 0.0
    arcs = sum(
        value.value.mean
        for arcs in (profile.source_arcs, profile.destination_arcs)
        for arc, value in arcs.items()
        if arc not in _OUTSIDE
    )
    reading = max(reads, devices * part * reads) if parallel else devices * reads
    downtime = devices * (arcs + OVERHEAD_SECONDS) + reading + devices * still
    return ReplayPrediction(True, left, threshold_bytes, seconds, downtime)


def _read_in_a_window(calls: Calls, bandwidth: float) -> float:
    """Return the bytes that a client reads in 0.1 s: as the link allows, and as the device takes its time."""
    cost = _seconds_per_byte(calls) + 1 / bandwidth
    return WINDOW_SECONDS / cost if cost else 1e18


def _seconds_per_byte(calls: Calls) -> float:
    """Return how long the device takes to give a byte, on average."""
    if calls.seconds is None:
        return 0.0
    block = calls.bytes.value.mean if calls.bytes is not None else _BLOCK_BYTES
    return calls.seconds.value.mean / block
