"""Does the migration converge? What the servers measure beside what QEMU would accept, and one sentence.

Rates and verdicts come from the servers (`vfu_dev.migration.forecast` says how they are made). Here they are
only added up over the devices of a VM, which share one link, and compared with QEMU's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vfu_dev.model.link import QEMU_STEP_BYTES, qemu_bandwidth
from vfu_dev.sizes import format_size


def threshold_bytes(parameters: Mapping[str, Any], limit_ms: float, reply: Mapping[str, Any]) -> float | None:
    """Return how much QEMU is willing to leave for the downtime; None before it measured a bandwidth.

    Source:  QEMU 10.2, migration/migration.c: threshold_size = bandwidth x downtime-limit, with
    avail-switchover-bandwidth, when set, in place of what was measured (`ram.mbps` of query-migrate).
    """
    bandwidth = parameters.get("avail_switchover_bandwidth") or reply.get("ram", {}).get("mbps", 0) * 1e6 / 8
    return bandwidth * limit_ms / 1000 if bandwidth else None


@dataclass(frozen=True)
class Limits:
    """What QEMU was told, for the sentence: bytes a second and milliseconds.

    Attributes:
        max_bandwidth: what the migration may send; 0: no limit. QEMU sends device state in whole blocks each
            100 ms, so it sends more than a low limit says.
        switchover_bandwidth: what it reckons with for the switchover; 0: what it measures.
    """

    max_bandwidth: int
    switchover_bandwidth: int
    downtime_limit_ms: int

    @classmethod
    def of(cls, parameters: Mapping[str, Any], limit_ms: int) -> Limits:
        """Return those of migration parameters, with QEMU's defaults where nothing is said."""
        return cls(
            parameters.get("max_bandwidth", 0), parameters.get("avail_switchover_bandwidth", 0), limit_ms
        )

    def transfer_note(self) -> str:
        """Return why more is sent than was allowed, in brackets; nothing where the limit is a step."""
        if qemu_bandwidth(self.max_bandwidth) == self.max_bandwidth:
            return ""
        step = format_size(QEMU_STEP_BYTES)
        return f" (max-bandwidth {format_size(self.max_bandwidth)}/s, in QEMU's steps of {step}/s)"

    def threshold_note(self, threshold: float) -> str:
        """Return what the threshold is made of, in brackets."""
        rate = self.switchover_bandwidth or threshold * 1000 / self.downtime_limit_ms
        source = "avail-switchover-bandwidth" if self.switchover_bandwidth else "measured"
        return f" ({source} {format_size(rate)}/s x {self.downtime_limit_ms} ms)"


@dataclass(frozen=True)
class Convergence:
    """How a pre-copy stands. Bytes and bytes a second are sums over the devices; None: not known yet.

    Attributes:
        converging: None also while it cannot be told because QEMU sends other data, RAM most of all.
        ratio: transfer rate over dirty rate; None also when nothing is written.
        remaining_bytes: device state, and the guest's RAM.
        ram_bytes: the part that is RAM. As long as there is much of it, QEMU has little time for devices.
        predicted_downtime_seconds: if the devices stopped now; their reads share the link.
        limits: what the numbers are held against.
    """

    converging: bool | None
    dirty_rate_bytes_per_second: float | None
    transfer_rate_bytes_per_second: float | None
    ratio: float | None
    remaining_bytes: int | None
    ram_bytes: int
    threshold_bytes: float | None
    predicted_downtime_seconds: float | None
    limits: Limits | None = None

    @property
    def fits(self) -> bool | None:
        """Whether what remains is within QEMU's threshold."""
        if self.remaining_bytes is None or self.threshold_bytes is None:
            return None
        return self.remaining_bytes <= self.threshold_bytes

    @property
    def text(self) -> str:
        """The sentence, with the numbers that decide it."""
        dirty, transfer = self.dirty_rate_bytes_per_second, self.transfer_rate_bytes_per_second
        if dirty is None or transfer is None:
            return f"measuring rates{self._left}"
        if self.converging is None:
            ram = self.ram_bytes > (self.threshold_bytes or 0)
            word = "too early to tell" + (", QEMU sends RAM" if ram else "")
        else:
            word = "converging" if self.converging else "not converging"
        rates = (
            f"dirty rate {_rate(dirty)} {'<' if dirty < transfer else '>'} transfer rate {_rate(transfer)}"
        )
        if self.limits is not None:
            rates += self.limits.transfer_note()
        if self.ratio is not None:
            rates += f" (ratio {self.ratio:.2f})"
        return f"{word}: {rates}{self._left}"

    @property
    def _left(self) -> str:
        if self.remaining_bytes is None:
            return ""
        text = f", remaining {format_size(self.remaining_bytes)}"
        if self.threshold_bytes is not None:
            text += f" {'<=' if self.fits else '>'} threshold {format_size(self.threshold_bytes)}"
            if self.limits is not None:
                text += self.limits.threshold_note(self.threshold_bytes)
        return text

    def to_json(self) -> dict[str, Any]:
        """Return figures and sentence."""
        return {**asdict(self), "text": self.text}


def _rate(value: float | None) -> str:
    return "unknown" if value is None else f"{format_size(value)}/s"


def _sum(forecasts: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = [forecast.get(key) for forecast in forecasts]
    return None if not values or None in values else sum(value for value in values if value is not None)


def assess(
    forecasts: Sequence[Mapping[str, Any]],
    reply: Mapping[str, Any],
    threshold: float | None,
    limits: Limits | None = None,
) -> Convergence:
    """Return how the migration stands.

    Args:
        forecasts: the `forecast` of each device's server (see its `figures`).
        reply: of `query-migrate`.
        threshold: see `threshold_bytes`.
        limits: what QEMU was told, for the sentence.
    """
    dirty = _sum(forecasts, "dirty_rate_bytes_per_second")
    transfer = _sum(forecasts, "transfer_rate_bytes_per_second")
    length = _sum(forecasts, "stop_copy_length_bytes")
    ram = reply.get("ram", {}).get("remaining", 0)
    converging: bool | None = None
    if dirty is not None and transfer is not None:
        # One of several devices may be read slowly while the others are; together they tell.
        alone = [forecast["converging"] for forecast in forecasts]
        converging = True if transfer > dirty else False if False in alone else None
    return Convergence(
        converging=converging,
        dirty_rate_bytes_per_second=dirty,
        transfer_rate_bytes_per_second=transfer,
        ratio=transfer / dirty if dirty and transfer is not None else None,
        remaining_bytes=None if length is None else max(0, length) + ram,
        ram_bytes=ram,
        threshold_bytes=threshold,
        predicted_downtime_seconds=_sum(forecasts, "predicted_downtime_seconds"),
        limits=limits,
    )
