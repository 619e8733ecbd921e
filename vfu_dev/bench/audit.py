"""The cost of checking a whole state in memory against what was sent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns
from vfu_dev.bench.peers import Bench, BenchError
from vfu_dev.bench.stream import MIB, SCANNED_MIB, seconds_a_gib
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import MigratableState, StateHasher
from vfu_dev.migration.audit import Audit
from vfu_dev.migration.records import SaveRecord


def whole(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure the milliseconds per GiB of the audit, after all was sent; the peer hashes the same bytes once.

    The peer is the xxhash package's XXH3 of 64 bits, in one call: no pages, no digest, nothing to compare.
    """
    memory = DeviceMemory("bench", SCANNED_MIB * MIB)
    try:
        yield figure("audit/gib", "ms", _rounds(memory, effort), "xxhash")
    finally:
        memory.close()


def _rounds(memory: DeviceMemory, effort: Effort) -> list[tuple[float, float]]:
    memory.words[:] = np.random.default_rng(3).integers(1, 1 << 63, memory.words.shape, dtype=np.uint64)
    everything = np.arange(memory.page_count, dtype=np.intp)
    memory.pages.mark_pages(everything)
    memory.pages.claim(everything)  # as if all had just been sent
    contents = MigratableState("bench", [memory], [])
    sent = StateHasher(contents)
    sent.advance()
    digest = sent.digest()

    def audit() -> float:
        record = SaveRecord(status="sent", digest=digest)
        seconds = seconds_a_gib(lambda: Audit(contents, [], record).advance(float("inf")), memory)
        if not record.audited or record.error:
            raise BenchError(f"the audit of {SCANNED_MIB} MiB: {record.error or 'it was given up'}")
        return seconds * 1000

    def plain() -> float:
        return seconds_a_gib(lambda: xxhash.xxh3_64_intdigest(memory.data.data), memory) * 1000

    audit()
    return in_turns(effort.rounds, audit, plain)
