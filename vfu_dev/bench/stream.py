"""The rates of the state stream, out and in, and the cost of finding dirty pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns
from vfu_dev.bench.mmio import C_SERVER
from vfu_dev.bench.peers import Bench, Served
from vfu_dev.bench.raw import Moved, RawClient
from vfu_dev.memory import DeviceMemory, Fingerprints
from vfu_dev.memory.kernels import address
from vfu_dev.memory.sending import Record, Reply, send
from vfu_dev.uapi import DeviceState

MIB = 1 << 20
GIB = 1 << 30
SCANNED_MIB = 256
DIRTY_SHARE = 0.01  # of the pages, before each scan


def out(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure MiB per second of MIG_DATA_READ in PRE_COPY, trapped and mapped; the peer is the C server."""
    peer = bench.reference(effort.memory_mib)
    for access in ("trap", "mmap"):
        ours = bench.ours(effort.memory_mib, "--access", access)
        with RawClient(ours.socket) as mine, RawClient(peer.socket) as theirs:
            pairs = in_turns(effort.rounds, reading(mine), reading(theirs))
        bench.stop(ours)
        yield figure(f"stream-out-{access}/rate", "MiB/s", pairs, C_SERVER)


def rate_of(moved: Moved) -> float:
    """Return MiB a second."""
    return moved.count_bytes / MIB / (moved.nanoseconds / 1e9)


def reading(client: RawClient) -> Callable[[], float]:
    """Return what reads all of a device's state in PRE_COPY, and returns MiB a second."""

    def read() -> float:
        client.set_state(DeviceState.PRE_COPY)
        rate = rate_of(client.drain())
        client.set_state(DeviceState.RUNNING)
        return rate

    return read


def into(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure MiB per second of MIG_DATA_WRITE, including the final check of all data."""
    size = effort.memory_mib
    files = [stream_of(bench, bench.ours(size)), stream_of(bench, bench.reference(size))]
    ours, peer = bench.ours(size, fill=0), bench.reference(size, fill=0)
    with RawClient(ours.socket) as mine, RawClient(peer.socket) as theirs:
        pairs = in_turns(
            effort.rounds, lambda: rate_of(mine.feed(files[0])), lambda: rate_of(theirs.feed(files[1]))
        )
    yield figure("stream-in/rate", "MiB/s", pairs, C_SERVER)


def stream_of(bench: Bench, server: Served) -> Path:
    """Return a file with the whole state of a device."""
    file = bench.file(f"{server.socket.stem}.stream")
    with RawClient(server.socket) as client:
        client.set_state(DeviceState.STOP_COPY)
        client.drain(file)
        client.set_state(DeviceState.RUNNING)
    bench.stop(server)
    return file


def scans(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure the milliseconds per GiB of memory to find the pages written since the last scan.

    Mapped memory is compared with the fingerprints of what was sent; the peer is numpy comparing it with a
    copy. Of trapped memory only the page map is scanned; the peer is numpy counting its bytes.
    """
    mapped = DeviceMemory("bench", SCANNED_MIB * MIB, mapped=True)
    try:
        yield figure("scan-mmap/gib", "ms", _scan_mapped(mapped, effort), "numpy compares")
    finally:
        mapped.close()
    tracked = DeviceMemory("bench", SCANNED_MIB * MIB)
    try:
        yield figure("scan-trap/gib", "ms", _scan_tracked(tracked, effort), "numpy counts")
    finally:
        tracked.close()


def _some_pages(memory: DeviceMemory) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    count = round(memory.page_count * DIRTY_SHARE)
    chosen = np.random.default_rng(1).choice(memory.page_count, count, replace=False)
    return np.sort(chosen).astype(np.intp)


def _scan_mapped(memory: DeviceMemory, effort: Effort) -> list[tuple[float, float]]:
    everything = np.arange(memory.page_count, dtype=np.intp)
    memory.words[:] = np.random.default_rng(2).integers(1, 1 << 63, memory.words.shape, dtype=np.uint64)
    memory.relearn()
    memory.classify()
    sent = Fingerprints(memory)
    copy = memory.words.copy()
    hashes = np.zeros(memory.page_count, dtype=np.uint64)
    record = Record(memory.rows, memory.pages.codes, hashes, sent)
    out = np.empty(MIB, dtype=np.uint8)
    chosen = _some_pages(memory)

    def scan() -> float:
        record.begin(b"", everything, 0)
        while len(record.pending):
            send(record, Reply(), len(out), address(out))
        memory.words[chosen, 0] += np.uint64(1)
        return seconds_a_gib(lambda: sent.scan(float("inf")), memory) * 1000

    def compare() -> float:
        return seconds_a_gib(lambda: np.count_nonzero(memory.words != copy), memory) * 1000

    scan()
    return in_turns(effort.rounds, scan, compare)


def _scan_tracked(memory: DeviceMemory, effort: Effort) -> list[tuple[float, float]]:
    pages, chosen = memory.pages, _some_pages(memory)
    pages.mark_pages(np.arange(memory.page_count, dtype=np.intp))

    def collect() -> float:
        pages.claim(np.arange(memory.page_count, dtype=np.intp))
        pages.mark_pages(chosen)
        return seconds_a_gib(pages.collect, memory) * 1000

    def count() -> float:
        return seconds_a_gib(lambda: np.count_nonzero(pages.codes), memory) * 1000

    collect()
    return in_turns(effort.rounds, collect, count)


def seconds_a_gib(action: Callable[[], object], memory: DeviceMemory) -> float:
    """Return the time of an action on all of a memory, per GiB of it."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * GIB / memory.size_bytes
