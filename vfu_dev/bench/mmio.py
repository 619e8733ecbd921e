"""Latency of a guest's MMIO: idle, while the server is scraped or polled, and during PRE_COPY."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns, percentiles
from vfu_dev.bench.peers import Bench, BenchError
from vfu_dev.bench.raw import Accesses, Nanoseconds, RawClient
from vfu_dev.device.reference.layout import REGISTERS
from vfu_dev.uapi import VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR2_REGION_INDEX, DeviceState
from vfu_dev.vm.process import STOP_SECONDS

C_SERVER = "C server"
# Pages of BAR2 that accesses go to: a guest uses many pages, too.
MEMORY = Accesses(VFIO_PCI_BAR2_REGION_INDEX, stride_bytes=4096, places=1024)
# Registers without a meaning, in BAR0 of the reference device; and `ctrl`, which Python looks at.
SCRATCH = Accesses(VFIO_PCI_BAR0_REGION_INDEX, offset=REGISTERS["scratch"].offset, stride_bytes=8, places=16)
HOOKED = Accesses(VFIO_PCI_BAR0_REGION_INDEX, offset=REGISTERS["ctrl"].offset, count_bytes=4)
READS_BEHIND = 12  # migration reads of 1 MiB a round, with one MMIO waiting behind each


def at_rest(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure reads and writes of an idle device; the peer is the C server's device."""
    ours, peer = bench.ours(effort.memory_mib), bench.reference(effort.memory_mib)
    calls = effort.calls
    with RawClient(ours.socket) as mine, RawClient(peer.socket) as theirs:
        for client in (mine, theirs):  # caches and page tables
            client.reads(MEMORY, calls)
            client.writes(MEMORY, calls)
        reads = in_turns(
            effort.rounds, lambda: mine.reads(MEMORY, calls), lambda: theirs.reads(MEMORY, calls)
        )
        yield from percentiles("mmio-read", reads, C_SERVER)
        writes = in_turns(
            effort.rounds, lambda: mine.writes(MEMORY, calls), lambda: theirs.writes(MEMORY, calls)
        )
        yield from percentiles("mmio-write", writes, C_SERVER)
        posted = in_turns(
            effort.rounds,
            lambda: mine.posted(MEMORY, calls) / 1000,
            lambda: theirs.posted(MEMORY, calls) / 1000,
        )
        yield figure("mmio-posted/each", "us", posted, C_SERVER)
        hooked = in_turns(
            effort.rounds, lambda: mine.writes(HOOKED, calls), lambda: theirs.writes(MEMORY, calls)
        )
        yield from percentiles("mmio-register", hooked, C_SERVER, which=(50,))


@contextmanager
def scraping(*where: object) -> Iterator[None]:
    """Query a metrics port, and a control socket if given, ten times a second.

    Raises: BenchError: one of them does not answer.
    """
    argv = [sys.executable, "-m", "vfu_dev.bench.scraper", *map(str, where)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as scraper:
        assert scraper.stdin is not None
        assert scraper.stdout is not None
        try:
            if scraper.stdout.readline().strip() != "scraping":
                raise BenchError("the metrics port does not answer")
            yield
        finally:
            scraper.stdin.close()
            scraper.wait(STOP_SECONDS)


def scraped(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure reads under ten scrapes of /metrics per second; the peer is the same server, not scraped."""
    server = bench.ours(effort.memory_mib, metrics=True)
    with RawClient(server.socket) as client:
        pairs = _windows(client, effort, lambda: scraping(server.port))
    yield from percentiles("mmio-scraped", pairs, "not scraped")


def polled(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure reads in PRE_COPY under ten queries of each kind per second; the peer is not queried.

    All of memory is still unsent, so a query that scanned it would be slow.
    """
    server = bench.ours(effort.memory_mib, metrics=True)
    with RawClient(server.socket) as client:
        client.set_state(DeviceState.PRE_COPY)
        pairs = _windows(client, effort, lambda: scraping(server.port, server.control))
        client.set_state(DeviceState.RUNNING)
    yield from percentiles("mmio-polled", pairs, "not polled")


def _windows(
    client: RawClient, effort: Effort, asking: Callable[[], AbstractContextManager[None]]
) -> list[tuple[Nanoseconds, Nanoseconds]]:
    """Return the latencies of reads with and without `asking`, in windows taken in turns."""
    client.reads(MEMORY, effort.calls // 4)

    def window() -> Nanoseconds:
        end, found = time.monotonic() + effort.seconds, []
        while time.monotonic() < end:
            found.append(client.reads(MEMORY, 200))
        return np.concatenate(found)

    def window_asked() -> Nanoseconds:
        with asking():
            return window()

    return in_turns(effort.rounds, window_asked, window)


class Moving:
    """MMIO of a device in PRE_COPY, between migration reads and behind them.

    Args: where: where the accesses go; the device gets them as messages.
    """

    def __init__(self, client: RawClient, where: Accesses, calls: int) -> None:
        self._client = client
        self._where = where
        self._calls = calls

    def __call__(self) -> tuple[Nanoseconds, Nanoseconds]:
        """Return the latencies of one session between migration reads and behind one; then cancel it."""
        client = self._client
        client.set_state(DeviceState.PRE_COPY)
        behind, between = [], []
        for _ in range(READS_BEHIND):
            behind.append(client.write_behind(self._where))
            between.append(client.writes(self._where, self._calls // READS_BEHIND))
        client.set_state(DeviceState.RUNNING)
        return np.concatenate(between), np.array(behind, np.int64)


def in_precopy(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure writes during PRE_COPY, to a trapped and to a mapped device; the peer is the C server."""
    peer = bench.reference(effort.memory_mib)
    for access, where in (("trap", MEMORY), ("mmap", SCRATCH)):
        ours = bench.ours(effort.memory_mib, "--access", access)
        with RawClient(ours.socket) as mine, RawClient(peer.socket) as theirs:
            my_move = Moving(mine, where, effort.calls)
            their_move = Moving(theirs, MEMORY, effort.calls)
            for move in (my_move, their_move):
                move()
            pairs = in_turns(effort.rounds, my_move, their_move, touched_bytes=2 * effort.memory_mib << 20)
        bench.stop(ours)
        between = [(first[0], second[0]) for first, second in pairs]
        behind = [(first[1], second[1]) for first, second in pairs]
        yield from percentiles(f"mmio-precopy-{access}", between, C_SERVER)
        yield from percentiles(f"mmio-behind-read-{access}", behind, C_SERVER, which=(50,))
