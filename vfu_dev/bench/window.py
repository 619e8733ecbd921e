"""Migration data in a window (native/spec): how fast it goes out and in, and what MMIO waits behind it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns
from vfu_dev.bench.mmio import C_SERVER, MEMORY
from vfu_dev.bench.peers import Bench
from vfu_dev.bench.raw import Nanoseconds, RawClient
from vfu_dev.bench.stream import rate_of, reading, stream_of
from vfu_dev.uapi import DeviceState

# Requests for migration data that the client has under way, 4 MiB each.
PLACES = 2
# MMIO that comes with a migration read, and that much later: a vCPU does not choose the moment.
DELAYS_NS = (0, 20_000, 50_000, 80_000, 120_000)
SESSIONS = 4  # a round; each has one read of 1 MiB for each MiB of memory but the last
BOUND_US = 100.0
C_MESSAGES = f"{C_SERVER}, no window"


def data(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Migration data in a window, against the C server's in messages; and writes behind reads in it."""
    size = effort.memory_mib
    ours, peer = bench.ours(size), bench.reference(size)
    with RawClient(ours.socket, PLACES) as mine, RawClient(peer.socket) as theirs:
        pairs = in_turns(effort.rounds, reading(mine), reading(theirs))
        yield figure("window-out/rate", "MiB/s", pairs, C_MESSAGES)
        waits = [_waits(mine, size) for _ in range(effort.rounds)]
    tails = [(float(np.percentile(wait, 99)) / 1000, BOUND_US) for wait in waits]
    yield figure("mmio-behind-window/p99", "us", tails, "a bound")
    files = [stream_of(bench, ours), stream_of(bench, peer)]
    ours, peer = bench.ours(size, fill=0), bench.reference(size, fill=0)
    with RawClient(ours.socket, PLACES) as mine, RawClient(peer.socket) as theirs:
        pairs = in_turns(
            effort.rounds, lambda: rate_of(mine.feed(files[0])), lambda: rate_of(theirs.feed(files[1]))
        )
    yield figure("window-in/rate", "MiB/s", pairs, C_MESSAGES)


def _waits(client: RawClient, memory_mib: int) -> Nanoseconds:
    """Return how long writes waited that came with a read of 1 MiB in PRE_COPY, or while it was served."""
    found = []
    for session in range(SESSIONS):
        client.set_state(DeviceState.PRE_COPY)
        for number in range(memory_mib - 1):
            delay_ns = DELAYS_NS[(session + number) % len(DELAYS_NS)]
            found.append(client.write_during(MEMORY, delay_ns) if delay_ns else client.write_behind(MEMORY))
        client.set_state(DeviceState.RUNNING)
    return np.array(found, dtype=np.int64)
