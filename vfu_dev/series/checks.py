"""The checks of a scenario's result: `[[check]]` tables, and their evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfu_dev.series.rows import METRICS, Row, values_of
from vfu_dev.toml_source import Source

KNOWN = ("metric", "variant", "against", "percentile", "min-ratio", "max-ratio", "min", "max")


@dataclass(frozen=True)
class Check:
    """A percentile of `metric`, of one variant's completed moves or of all; alone or against another's."""

    metric: str
    variant: str | None = None
    against: str | None = None
    percentile: float = 50.0
    min_ratio: float | None = None
    max_ratio: float | None = None
    min: float | None = None
    max: float | None = None

    @property
    def _ratio(self) -> bool:
        return self.against is not None

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """The lowest and the highest value allowed."""
        return (self.min_ratio, self.max_ratio) if self._ratio else (self.min, self.max)

    def judge(self, rows: Mapping[str | None, Sequence[Row]]) -> dict[str, Any]:
        """Return the result: `ok`, `value`, `text`.

        Args: rows: of each variant; None: of all there are.
        """
        mine = self._percentile(rows[self.variant])
        others = self._percentile(rows[self.against]) if self._ratio else None
        what = f"{self.percentile:g}th percentile of {self.metric}"
        what += f" of {self.variant}" if self.variant else ""
        what += f" over that of {self.against}" if self._ratio else ""
        value = mine if not self._ratio else mine / others if mine is not None and others else None
        low, high = self.limits
        if value is None:
            return {"ok": False, "value": None, "text": f"{what}: nothing was measured"}
        ok = (low is None or value >= low) and (high is None or value <= high)
        words = ("at least", low), ("at most", high)
        asked = " and ".join(f"{word} {limit:g}" for word, limit in words if limit is not None)
        figures = f" ({mine:.4g} over {others:.4g})" if self._ratio else ""
        return {"ok": ok, "value": value, "text": f"{what}: {value:.4g}{figures}, {asked} asked"}

    def _percentile(self, rows: Sequence[Row]) -> float | None:
        values = values_of(rows, self.metric)
        return float(np.percentile(values, self.percentile)) if values else None


def parse_check(source: Source, entry: Any, variants: tuple[str, ...]) -> Check:
    """Return the check of one `[[check]]` table. Raises: ConfigError: file, line, key and what is allowed."""
    if not isinstance(entry, dict) or "metric" not in entry:
        raise source.error("check", "expected [[check]] tables, each with a metric")
    for key, value in entry.items():
        at = f"check.{key}"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in KNOWN:
            raise source.error(at, f"no such key; there are {', '.join(KNOWN)}")
        if key == "metric" and value not in METRICS:
            raise source.error(at, f"{value!r}: expected one of {', '.join(METRICS)}")
        if key in ("variant", "against") and value not in variants:
            raise source.error(at, f"{value!r}: expected a variant: {', '.join(variants) or 'there is none'}")
        if key not in ("metric", "variant", "against") and not number:
            raise source.error(at, f"{value!r}: expected a number")
    check = Check(**{key.replace("-", "_"): value for key, value in entry.items()})
    if check.limits == (None, None):
        raise source.error("check", "expected min or max; with `against`, min-ratio or max-ratio")
    if not 0 <= check.percentile <= 100:
        raise source.error("check.percentile", "expected a number from 0 to 100")
    return check
