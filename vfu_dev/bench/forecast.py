"""The ratio of predicted to measured downtime, and of the server's to the client's measurement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vfu_dev.bench.figures import Effort, Figure, figure
from vfu_dev.bench.peers import Bench
from vfu_dev.client import ControlClient, VfioUserDevice
from vfu_dev.client.migrator import ClientOptions, Migrator

# A quarter of the memory is initial, the rest counts as dirty. The link carries all of it in a second, so the
# device is stopped with a quarter left.
INITIAL_SHARE = 4
MOVE_SECONDS = 1.0
DOWNTIME_LIMIT_SECONDS = 0.25


class _Downtimes(NamedTuple):
    """One move's downtime in seconds, predicted and measured by the server, and measured by the client."""

    predicted: float
    measured: float
    client: float


def downtimes(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure the downtime in milliseconds over a link with a bandwidth limit."""
    found = [_move(bench, effort) for _ in range(effort.rounds)]
    yield _apart("forecast/apart", [(one.predicted, one.measured) for one in found], "measured")
    yield _apart("downtime/apart", [(one.measured, one.client) for one in found], "client's")


def _move(bench: Bench, effort: Effort) -> _Downtimes:
    """Move a device between two new servers, whose forecasts have learnt nothing yet."""
    size = effort.memory_mib
    source = bench.ours(size, "--initial", f"{size // INITIAL_SHARE}M", metrics=True)
    destination = bench.ours(size, fill=0)
    bandwidth = round((size << 20) / MOVE_SECONDS)
    options = ClientOptions(
        downtime_limit_seconds=DOWNTIME_LIMIT_SECONDS, max_bandwidth=bandwidth, max_passes=None
    )
    with VfioUserDevice.connect(source.socket) as ours, VfioUserDevice.connect(destination.socket) as theirs:
        progress = Migrator(ours, theirs, options).run()
    with ControlClient(source.control) as control:
        snapshot = control.command("figures")["snapshot"]
    bench.stop(source)
    bench.stop(destination)
    return _Downtimes(
        snapshot["last_predicted_downtime_seconds"],
        snapshot["last_downtime_seconds"],
        progress.downtime_seconds,
    )


def _apart(name: str, pairs: list[tuple[float, float]], peer_name: str) -> Figure:
    """Return the longer of two times divided by the shorter."""
    return figure(name, "ms", [(max(pair) * 1000, min(pair) * 1000) for pair in pairs], peer_name)
