"""The incoming session: stores what a stream carries, and says at the end whether it is the whole truth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import StreamError
from vfu_dev.memory import DeviceMemory, fold_hashes, hash_pages, scatter
from vfu_dev.memory.pages import CODE_DATA, CODE_NEVER, CODE_ZERO, PageIndices
from vfu_dev.migration.schema import MigratableState, blocks_digest
from vfu_dev.migration.stream import StreamDecoder


class LoadSession:
    """One incoming migration: `write` slices of the stream, `finish` when no more will come.

    Memory is written as it arrives, register blocks only when everything was verified. Until `finish`
    returned the device must not run: a load that is given up leaves memory that nobody verified.

    Args:    state: what migrates; its memories are cleared.

    Attributes:
        digest: of the state as it lies in memory, hex; None until the end of the stream was verified.
    """

    def __init__(self, state: MigratableState) -> None:
        self.digest: str | None = None
        self._state = state
        self._blocks: list[bytes] = []
        self._hashes: list[npt.NDArray[np.uint64]] = []
        for memory in state.memories:
            memory.clear()
            self._hashes.append(np.zeros(memory.page_count, dtype=np.uint64))
        self._decoder = StreamDecoder(state, self)

    @property
    def received_bytes(self) -> int:
        """Stream bytes taken so far."""
        return self._decoder.received_bytes

    @property
    def failure(self) -> StreamError | None:
        """Why the stream was refused, or None."""
        return self._decoder.failure

    def write(self, data: memoryview) -> None:
        """Take the next slice.

        Raises:  StreamError: now and on every later call.
        """
        self._decoder.feed(data)

    def finish(self) -> None:
        """Complete the load: register blocks take effect.

        Raises:  StreamError: something is missing or was wrong; the device must not run.
        """
        self._decoder.finish()
        for block, content in zip(self._state.blocks, self._blocks, strict=True):
            block.unpack(content)

    # --- StreamSink ---------------------------------------------------------------------------------------

    def take_pages(self, memory: int, indices: PageIndices, payload: npt.NDArray[np.uint8]) -> None:
        """Store pages; their hashes are those of what now lies in memory, not of what arrived."""
        target = self._state.memories[memory]
        scatter(target.rows, indices, payload)
        target.pages.codes[indices] = CODE_DATA
        self._hashes[memory][indices] = hash_pages(target.raw, target.page_size_bytes, indices)

    def take_zeros(self, memory: int, indices: PageIndices) -> None:
        """Make pages zero; one never written is zero and is not touched, or it would be allocated."""
        target: DeviceMemory = self._state.memories[memory]
        codes = target.pages.codes
        written = indices[codes[indices] != CODE_NEVER]
        target.rows[written] = 0
        codes[indices] = CODE_ZERO
        self._hashes[memory][indices] = 0

    def take_block(self, block: int, content: bytes) -> None:
        """Keep a register block until all is verified."""
        self._blocks.append(content)

    def take_end(self, memory_digests: list[bytes], blocks_digest_sent: bytes) -> None:
        """Compare what lies in memory with what the source says it sent."""
        ours = [fold_hashes(hashes) for hashes in self._hashes]
        for memory, here, sent in zip(self._state.memories, ours, memory_digests, strict=True):
            if here != sent:
                raise StreamError(f"memory {memory.name}: digest {here.hex()}, the source sent {sent.hex()}")
        if blocks_digest(self._blocks) != blocks_digest_sent:
            raise StreamError("the digest of the register blocks differs from the one sent")
        self.digest = self._state.digest(ours, self._blocks)
