"""The digest of a state as it lies in memory, computed in steps that never block the loop for long."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vfu_dev.memory import fold_hashes, hash_pages
from vfu_dev.migration.schema import MigratableState


class StateHasher:
    """Hashes every page that the kernel holds for a state's memories, page map or not.

    That makes it the check on dirty tracking: a write that nobody marked is in memory, but not in the hashes
    of what was sent. 64 MiB take 3 ms.
    """

    def __init__(self, state: MigratableState) -> None:
        self._state = state
        self.hashes: list[npt.NDArray[np.uint64]] = [
            np.zeros(m.page_count, dtype=np.uint64) for m in state.memories
        ]
        self._steps = self._run()
        self.done = False

    def _run(self) -> Iterator[None]:
        for memory, hashes in zip(self._state.memories, self.hashes, strict=True):
            for pages in memory.allocated_pages():
                step = max(1, (4 << 20) // memory.page_size_bytes)
                for start in range(0, len(pages), step):
                    batch = pages[start : start + step]
                    hashes[batch] = hash_pages(memory.raw, memory.page_size_bytes, batch)
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
            blocks = [block.pack_slot() for block in self._state.blocks]
        return self._state.digest([fold_hashes(hashes) for hashes in self.hashes], blocks)

    def differences(self, sent: list[npt.NDArray[np.uint64]]) -> list[str]:
        """Name the pages whose content differs from what was sent, one line for each memory that has any."""
        assert self.done
        lines = []
        for memory, here, there in zip(self._state.memories, self.hashes, sent, strict=True):
            pages = np.flatnonzero(here != there)
            if len(pages):
                lines.append(f"memory {memory.name}: {len(pages)} pages, the first is page {pages[0]}")
        return lines
