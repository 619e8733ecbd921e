"""Does the migration converge? The servers' measurements against QEMU's threshold, and one sentence.

Rates and verdicts come from the servers (`vfu_dev.migration.forecast` says how they are made). Here they are
only added up over the devices of a VM, which share one link, and compared with QEMU's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vfu_dev.convergence import is_converging, sentence, threshold_bytes, threshold_note
from vfu_dev.model.link import steps_note


def qemu_threshold_bytes(
    parameters: Mapping[str, Any], limit_ms: float, reply: Mapping[str, Any]
) -> float | None:
    """Return the bytes that QEMU accepts for the downtime; None before it measured a bandwidth.

    Source:  QEMU 10.2, migration/migration.c: threshold_size = bandwidth x downtime-limit, with
    avail-switchover-bandwidth, when set, in place of what was measured (`ram.mbps` of query-migrate).
    """
    bandwidth = parameters.get("avail_switchover_bandwidth") or reply.get("ram", {}).get("mbps", 0) * 1e6 / 8
    return threshold_bytes(bandwidth, limit_ms / 1000) if bandwidth else None


@dataclass(frozen=True)
class Limits:
    """QEMU's limits, for the sentence: bytes a second and milliseconds.

    Attributes:
        max_bandwidth: bandwidth limit of the migration; 0: no limit. QEMU sends device state in whole blocks
            each 100 ms, so it exceeds a low limit.
        switchover_bandwidth: bandwidth that QEMU uses for its decision; 0: the one that it measures.
    """

    max_bandwidth: int
    switchover_bandwidth: int
    downtime_limit_ms: int

    @classmethod
    def of(cls, parameters: Mapping[str, Any], limit_ms: int) -> Limits:
        """Return the limits in migration parameters, with QEMU's defaults for those not set."""
        return cls(
            parameters.get("max_bandwidth", 0), parameters.get("avail_switchover_bandwidth", 0), limit_ms
        )

    def threshold_note(self, threshold: float) -> str:
        """Return what the threshold is made of, in brackets."""
        seconds = self.downtime_limit_ms / 1000
        source = "avail-switchover-bandwidth" if self.switchover_bandwidth else "measured"
        return threshold_note(source, self.switchover_bandwidth or threshold / seconds, seconds)


@dataclass(frozen=True)
class Convergence:
    """Progress of a pre-copy. Bytes and bytes a second are sums over the devices; None: not known yet.

    Attributes:
        converging: None also while QEMU sends other data, mostly RAM, so that it is not known.
        ratio: transfer rate over dirty rate; None also when nothing is written.
        remaining_bytes: device state, and the guest's RAM.
        ram_bytes: the part that is RAM. While much of it is left, QEMU reads little from devices.
        predicted_downtime_seconds: if the devices stopped now; their reads share the link.
        precopy_bytes: what is left that can be sent before the stop, RAM included.
        limits: QEMU's limits that the figures are compared with.
    """

    converging: bool | None
    dirty_rate_bytes_per_second: float | None
    transfer_rate_bytes_per_second: float | None
    ratio: float | None
    remaining_bytes: int | None
    ram_bytes: int
    threshold_bytes: float | None
    predicted_downtime_seconds: float | None
    precopy_bytes: int | None = None
    limits: Limits | None = None

    @property
    def text(self) -> str:
        """The sentence, with the figures that decide convergence."""
        threshold, limits = self.threshold_bytes, self.limits
        return sentence(
            self.converging,
            self.dirty_rate_bytes_per_second,
            self.transfer_rate_bytes_per_second,
            self.remaining_bytes,
            threshold,
            all_read=self.precopy_bytes == 0,
            unless="QEMU sends RAM" if self.ram_bytes > (threshold or 0) else "",
            transfer_note=steps_note(limits.max_bandwidth) if limits else "",
            threshold_note=limits.threshold_note(threshold) if limits and threshold is not None else "",
        )

    def to_json(self) -> dict[str, Any]:
        """Return figures and sentence."""
        return {**asdict(self), "text": self.text}


def _sum(forecasts: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = [forecast.get(key) for forecast in forecasts]
    return None if not values or None in values else sum(value for value in values if value is not None)


def assess(
    forecasts: Sequence[Mapping[str, Any]],
    reply: Mapping[str, Any],
    threshold: float | None,
    limits: Limits | None = None,
) -> Convergence:
    """Return the progress of the migration.

    Args:
        forecasts: the `forecast` of each device's server (see its `figures`).
        reply: of `query-migrate`.
        threshold: see `qemu_threshold_bytes`.
        limits: QEMU's limits, for the sentence.
    """
    dirty = _sum(forecasts, "dirty_rate_bytes_per_second")
    transfer = _sum(forecasts, "transfer_rate_bytes_per_second")
    length = _sum(forecasts, "stop_copy_length_bytes")
    ram = reply.get("ram", {}).get("remaining", 0)
    initial, pending = _sum(forecasts, "initial_bytes"), _sum(forecasts, "dirty_bytes")
    # One of several devices may be read slowly while the others are read; only the sum is meaningful.
    stuck = any(forecast["converging"] is False for forecast in forecasts)
    return Convergence(
        converging=is_converging(dirty, transfer, stuck=stuck),
        dirty_rate_bytes_per_second=dirty,
        transfer_rate_bytes_per_second=transfer,
        ratio=transfer / dirty if dirty and transfer is not None else None,
        remaining_bytes=None if length is None else max(0, length) + ram,
        ram_bytes=ram,
        threshold_bytes=threshold,
        predicted_downtime_seconds=_sum(forecasts, "predicted_downtime_seconds"),
        precopy_bytes=None if initial is None or pending is None else initial + pending + ram,
        limits=limits,
    )
