"""Percentiles of measurements, and whether two sets of moves differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# The 25th is the field's figure for downtime (docs/series.md); minimum and mean stand beside it.
PERCENTILES = (25, 50, 95)
BOOTSTRAP_ROUNDS = 2000
# Fixed, so that the same two folders always give the same interval.
BOOTSTRAP_SEED = 20250


def percentiles(values: Sequence[float]) -> dict[str, float | int]:
    """Return n, p25, p50, p95, min, max and mean; only n where there are no values."""
    if not values:
        return {"n": 0}
    array = np.asarray(values, float)
    out: dict[str, float | int] = {"n": len(values)}
    for percentile in PERCENTILES:
        out[f"p{percentile}"] = float(np.percentile(array, percentile))
    return out | {"min": float(array.min()), "max": float(array.max()), "mean": float(array.mean())}


@dataclass(frozen=True)
class Difference:
    """Two sets of one metric. Ratios are second over first; None where the first is zero.

    Attributes:
        p_value: of the two-sided Mann-Whitney U test: how likely such ranks are if both sets come from one
            distribution. None with fewer than 2 values on a side.
        low, high: 95 % interval of the ratio of medians, by bootstrap.
    """

    n_first: int
    n_second: int
    ratios: dict[str, float | None]
    p_value: float | None
    low: float | None
    high: float | None

    @property
    def significant(self) -> bool:
        """Whether the sets differ, at the 5 % level."""
        return self.p_value is not None and self.p_value < 0.05

    @property
    def text(self) -> str:
        """The statement in words."""
        if self.p_value is None:
            return "too few moves to say anything"
        found = "differ" if self.significant else "no significant difference"
        return f"{found} (Mann-Whitney p = {self.p_value:.2g}, n = {self.n_first} and {self.n_second})"

    def to_json(self) -> dict[str, Any]:
        """Return figures and statement."""
        return {**asdict(self), "significant": self.significant, "text": self.text}


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two sets of measurements, in any order of values."""
    mine, others = percentiles(first), percentiles(second)
    ratios: dict[str, float | None] = {}
    for percentile in PERCENTILES:
        name = f"p{percentile}"
        base, other = mine.get(name), others.get(name)
        ratios[name] = other / base if base and other is not None else None
    p_value = low = high = None
    if len(first) > 1 and len(second) > 1:
        p_value = _mann_whitney(first, second)
        low, high = _interval(np.asarray(first, float), np.asarray(second, float))
    return Difference(len(first), len(second), ratios, p_value, low, high)


def _mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    if len({*first, *second}) == 1:
        return 1.0  # all alike: the test itself divides by a variance of zero
    # Imported here: most commands need no scipy, and it takes a while.
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(first, second, alternative="two-sided").pvalue)


def _interval(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> tuple[float | None, float | None]:
    random = np.random.default_rng(BOOTSTRAP_SEED)
    medians = [
        np.median(random.choice(values, (BOOTSTRAP_ROUNDS, len(values))), axis=1)
        for values in (first, second)
    ]
    if not medians[0].all():
        return None, None
    low, high = np.percentile(medians[1] / medians[0], (2.5, 97.5))
    return float(low), float(high)
