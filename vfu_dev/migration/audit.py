"""The digest of a state in memory, computed in steps that never block the loop for long.

`Audit` compares it with what a migration sent: the check on dirty tracking.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vfu_dev.memory import fold_hashes
from vfu_dev.memory.kernels import hash_pages
from vfu_dev.migration.records import SaveRecord
from vfu_dev.migration.schema import MigratableState


class StateHasher:
    """Hashes every page that the kernel holds for a state's memories, page map or not.

    That makes it the check on dirty tracking: an unmarked write is in memory, but not in the hashes
    of what was sent. 64 MiB take 3 ms.
    """

    def __init__(self, contents: MigratableState) -> None:
        self._contents = contents
        self.hashes: list[npt.NDArray[np.uint64]] = [
            np.zeros(m.page_count, dtype=np.uint64) for m in contents.memories
        ]
        self._steps = self._run()
        self.done = False

    def _run(self) -> Iterator[None]:
        for memory, hashes in zip(self._contents.memories, self.hashes, strict=True):
            for pages in memory.allocated_pages():
                step = max(1, (4 << 20) // memory.page_size_bytes)
                for start in range(0, len(pages), step):
                    batch = pages[start : start + step]
                    hashes[batch] = hash_pages(memory.rows, batch)
                    yield

    def advance(self, budget_seconds: float = float("inf")) -> bool:
        """Go on for about `budget_seconds`; returns whether all is hashed."""
        deadline = time.monotonic() + budget_seconds
        while not self.done:
            try:
                next(self._steps)
            except StopIteration:
                self.done = True
            if time.monotonic() > deadline:
                break
        return self.done

    def digest(self, blocks: list[bytes] | None = None) -> str:
        """Return the digest, with register blocks as they are now unless `blocks` are given."""
        assert self.done
        if blocks is None:
            blocks = [block.pack_slot() for block in self._contents.blocks]
        return self._contents.digest([fold_hashes(hashes) for hashes in self.hashes], blocks)


class Audit:
    """Compares what lies in memory with what was sent, after a stream was read to its end.

    Args:
        contents: what was sent; memory is as the stream's last read left it.
        blocks: the register blocks as they were sent. The device's own may change: a reset clears them.
        record: where the result goes.
    """

    def __init__(self, contents: MigratableState, blocks: list[bytes], record: SaveRecord) -> None:
        self.record = record
        self._memories = contents.memories
        self._blocks = blocks
        self._hasher = StateHasher(contents)
        self._written = [memory.pages.written_pages for memory in contents.memories]

    def _outdated(self) -> bool:
        """Return whether the page maps show that memory was written or cleared since; 0.1 ms for 4 GiB.

        Every page was clean at the end of the stream. A missed write marks no page, so it is still found.
        """
        return any(
            memory.pages.dirty_pages or memory.pages.written_pages != written
            for memory, written in zip(self._memories, self._written, strict=True)
        )

    def give_up(self) -> None:
        """Note that memory may change from now on, so that a difference would say nothing."""
        self.record.audited = None

    def advance(self, budget_seconds: float) -> bool:
        """Go on for about `budget_seconds`; returns whether it is over, with the result in the record.

        A difference means a write that dirty tracking missed: the record then shows the digest of what really
        is in memory, and fails.
        """
        if self._outdated():
            self.give_up()
            return True
        if not self._hasher.advance(budget_seconds):
            return False
        record, digest = self.record, self._hasher.digest(self._blocks)
        record.audited = True
        if digest != record.digest:
            record.status, record.digest = "failed", digest
            record.error = "memory is not what was sent, dirty tracking missed a write"
        return True
