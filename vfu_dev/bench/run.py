"""All cases, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from vfu_dev import JSON_VERSION, __version__
from vfu_dev.bench import dma, forecast, mmio, stream
from vfu_dev.bench.figures import Effort, Figure
from vfu_dev.bench.peers import Bench, bench, machine

Case = Callable[[Bench, Effort], Iterator[Figure]]

CASES: dict[str, Case] = {
    "mmio": mmio.at_rest,
    "scraped": mmio.scraped,
    "polled": mmio.polled,
    "precopy": mmio.in_precopy,
    "stream-out": stream.out,
    "stream-in": stream.into,
    "scan": stream.scans,
    "dma": dma.engine,
    "forecast": forecast.downtimes,
}


def run(
    names: Sequence[str], effort: Effort, reporter: Callable[[Figure], None] = lambda _: None
) -> dict[str, object]:
    """Measure the cases `names`; return the JSON object.

    Args:    reporter: called with each figure as it comes.
    Raises:  BuildError, BenchError, OSError: something cannot be measured.
    """
    before, began = machine(), time.time()
    figures = []
    for name in names:
        with bench() as one:
            for figure in CASES[name](one, effort):
                figures.append(figure)
                reporter(figure)
    return {
        "version": JSON_VERSION,
        "kind": "bench",
        "vfu_dev": __version__,
        "machine": before,
        "load_average_after": machine()["load_average"],
        "started": began,
        "seconds": time.time() - began,
        "rounds": effort.rounds,
        "figures": [figure.to_json() for figure in figures],
        "kept": all(figure.kept for figure in figures),
    }
