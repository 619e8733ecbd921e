"""What a metric is declared as, and how declared values become what prometheus_client writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family

PREFIX = "vfu_"
DEVICE_LABEL = "device"  # the first label of every metric

_FAMILIES = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
    "info": InfoMetricFamily,
}


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as it is scraped: with `vfu_`, base unit, and `_total` or `_info` where that belongs.
        kind: counter, gauge, histogram or info.
        help: what it is, and what a rise means.
        labels: besides `device`.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()

    def family(self) -> Family:
        """Return it without samples."""
        stem = self.name.removesuffix("_total" if self.kind == "counter" else "_info")
        labels = () if self.kind == "info" else self.labels
        family: Family = _FAMILIES[self.kind](stem, self.help, labels=(DEVICE_LABEL, *labels))
        return family

    def one(self, device: str, value: Any) -> Family:
        """Return it with one sample, for a metric without further labels; none when `value` is None.

        `value` is a number, a histogram as `Histogram.as_dict` gives it, or the labels of an `_info`.
        """
        return self.many(device, [] if value is None else [((), value)])

    def many(self, device: str, samples: Iterable[tuple[tuple[str, ...], Any]]) -> Family:
        """Return it with (further label values, value) pairs."""
        family: Any = self.family()
        for labels, value in samples:
            if self.kind == "histogram":
                family.add_metric((device, *labels), *_cumulative(value))
            else:
                family.add_metric((device, *labels), value)
        return family  # type: ignore[no-any-return]


def _cumulative(histogram: Mapping[str, Any]) -> tuple[list[tuple[str, int]], float]:
    """Return the cumulative buckets, `+Inf` last, and the sum of a histogram."""
    total = 0
    buckets = []
    for edge, count in zip([*histogram["edges"], float("inf")], histogram["counts"], strict=True):
        total += count
        buckets.append(("+Inf" if edge == float("inf") else repr(float(edge)), total))
    return buckets, histogram["sum"]
