"""One figure of a run, computed from rounds that were measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

from vfu_dev.bench.limits import LIMITS
from vfu_dev.bench.machine import touch_memory
from vfu_dev.bench.raw import Nanoseconds

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """The amount of work: `rounds` of each side, `calls` per round, windows of `seconds`."""

    rounds: int
    calls: int
    seconds: float
    memory_mib: int


FULL = Effort(rounds=9, calls=4000, seconds=2.0, memory_mib=64)
QUICK = Effort(rounds=3, calls=500, seconds=0.4, memory_mib=16)


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: `case/what`; LIMITS has the same.
        unit: of `ours` and `peer`.
        ours, peer: medians over the rounds.
        ratio: the median of the rounds' own ratios, ours over the peer's.
        ratio_low, ratio_high: their quartiles.
        peer_name: what the peer is.
    """

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    ratio_low: float
    ratio_high: float
    peer_name: str
    rounds: int

    @property
    def kept(self) -> bool:
        """Whether the ratio is within the limit."""
        return LIMITS[self.name].allows(self.ratio)

    def to_json(self) -> dict[str, object]:
        """Return the figure with its limit, as JSON."""
        limit = LIMITS[self.name]
        return {**asdict(self), "limit": limit.ratio, "better": limit.better, "kept": self.kept}


@dataclass(frozen=True)
class Failure:
    """A case that ended early.

    Attributes:
        case: the key in CASES.
        error: what ended it, as text.
        missing: number of its figures that were not measured.
    """

    case: str
    error: str
    missing: int


def in_turns(
    rounds: int, ours: Callable[[], T], peer: Callable[[], T], touched_bytes: int = 0
) -> list[tuple[T, T]]:
    """Measure both sides `rounds` times; the side that goes first alternates.

    Args: touched_bytes: memory that is touched before each round, if both sides then allocate some.
    """
    found = []
    for number in range(rounds):
        if touched_bytes:
            touch_memory(touched_bytes)
        if number % 2:
            second = peer()
            found.append((ours(), second))
        else:
            first = ours()
            found.append((first, peer()))
    return found


def figure(name: str, unit: str, pairs: Sequence[tuple[float, float]], peer_name: str) -> Figure:
    """Return the figure of all rounds."""
    ratios = [ours / peer for ours, peer in pairs]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return Figure(
        name=name,
        unit=unit,
        ours=statistics.median(ours for ours, _ in pairs),
        peer=statistics.median(peer for _, peer in pairs),
        ratio=float(middle),
        ratio_low=float(low),
        ratio_high=float(high),
        peer_name=peer_name,
        rounds=len(pairs),
    )


def percentiles(
    case: str,
    pairs: Sequence[tuple[Nanoseconds, Nanoseconds]],
    peer_name: str,
    which: Sequence[int] = (50, 99),
) -> list[Figure]:
    """Return a figure for each percentile of latencies in nanoseconds."""
    return [
        figure(
            f"{case}/p{percent}",
            "us",
            [
                (float(np.percentile(ours, percent)) / 1000, float(np.percentile(peer, percent)) / 1000)
                for ours, peer in pairs
            ],
            peer_name,
        )
        for percent in which
    ]
