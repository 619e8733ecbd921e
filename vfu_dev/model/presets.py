"""Two loads with a certain outcome, made from the figures that decide convergence.

A migration converges when what is left fits into the downtime limit: threshold = bandwidth * downtime limit.
Written slower than the link carries, a memory has less left after each pass, until it does. Written faster,
what is left settles where as many pages are written that are clean as the link sends: for uniform writes at
memory * (1 - bandwidth / dirty rate). As long as that is above the threshold, waiting does not help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS, sentence, threshold_bytes
from vfu_dev.errors import ConfigError
from vfu_dev.sizes import format_size
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES, Workload

# Against the link: far enough from 1 that a bandwidth twice or half of what was planned changes nothing.
NEVER_RATIO = 4.0
SURELY_RATIO = 0.125


@dataclass(frozen=True)
class Decision:
    """How a migration under a uniform load ends, and by which numbers.

    Attributes:
        dirty_rate_bytes: bytes of pages written a second: what the link would have to carry.
        bandwidth_bytes: what it carries, bytes a second.
        left_bytes: what is always left, once the migration ran for long.
        threshold_bytes: what may be left.
    """

    dirty_rate_bytes: float
    bandwidth_bytes: float
    left_bytes: float
    threshold_bytes: float

    @property
    def converges(self) -> bool:
        """Whether what is left gets below what may be."""
        return self.left_bytes <= self.threshold_bytes

    @property
    def text(self) -> str:
        """The numbers, in a sentence."""
        return sentence(
            self.converges, self.dirty_rate_bytes, self.bandwidth_bytes, self.left_bytes, self.threshold_bytes
        )


def decide(
    spec: Workload,
    bandwidth_bytes: float,
    memory_bytes: int,
    downtime_seconds: float = DOWNTIME_LIMIT_SECONDS,
    page_bytes: int = DEFAULT_PAGE_BYTES,
) -> Decision:
    """Return how a migration of `memory_bytes` under the uniform load `spec` ends."""
    if spec.pattern != "uniform" and not spec.is_idle:
        raise ConfigError(f"{spec.pattern}: the outcome is known for uniform loads only")
    dirty = float(spec.write_rate(page_bytes) * spec.pages_per_write(page_bytes) * page_bytes)
    left = 0.0 if dirty <= bandwidth_bytes else memory_bytes * (1 - bandwidth_bytes / dirty)
    return Decision(dirty, bandwidth_bytes, left, threshold_bytes(bandwidth_bytes, downtime_seconds))


def never_converges(
    bandwidth_bytes: float,
    memory_bytes: int,
    downtime_seconds: float = DOWNTIME_LIMIT_SECONDS,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    seed: int = 1,
) -> Workload:
    """Return a load under which a migration over such a link never ends by itself.

    Raises: ConfigError: the whole memory fits into the downtime limit, so every migration ends.
    """
    spec = _uniform(NEVER_RATIO, bandwidth_bytes, page_bytes, seed)
    decision = decide(spec, bandwidth_bytes, memory_bytes, downtime_seconds, page_bytes)
    # With room to spare: the link may turn out faster than it was said to be.
    if decision.left_bytes < 1.25 * decision.threshold_bytes:
        least = 1.25 * decision.threshold_bytes / (1 - 1 / NEVER_RATIO)
        raise ConfigError(
            f"a memory of {format_size(memory_bytes)} cannot be kept from converging: "
            f"{format_size(decision.threshold_bytes)} fit into {downtime_seconds * 1000:g} ms at "
            f"{format_size(bandwidth_bytes)}/s; it takes {format_size(least)} of memory, or a lower "
            "bandwidth or downtime limit"
        )
    return spec


def surely_converges(
    bandwidth_bytes: float,
    memory_bytes: int,
    downtime_seconds: float = DOWNTIME_LIMIT_SECONDS,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    seed: int = 1,
) -> Workload:
    """Return a load, of an eighth of the link, under which every migration over it ends."""
    del memory_bytes, downtime_seconds  # whatever they are
    return _uniform(SURELY_RATIO, bandwidth_bytes, page_bytes, seed)


def _uniform(ratio: float, bandwidth_bytes: float, page_bytes: int, seed: int) -> Workload:
    if bandwidth_bytes <= 0:
        raise ConfigError(f"bandwidth {bandwidth_bytes}: expected bytes a second, above 0")
    return Workload("uniform", rate_pages=ratio * bandwidth_bytes / page_bytes, seed=seed)


Preset = Callable[[float, int, float, int, int], Workload]
PRESETS: dict[str, Preset] = {"never": never_converges, "surely": surely_converges}
