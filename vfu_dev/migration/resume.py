"""The incoming session: stores what a stream carries, and says at the end whether it is the whole truth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import StreamError
from vfu_dev.memory import fold_hashes
from vfu_dev.memory.kernels import Arriving, Hashes, Target
from vfu_dev.memory.pages import CODE_NEVER, CODE_ZERO, PageIndices
from vfu_dev.migration.compat import Incoming
from vfu_dev.migration.decoder import StreamDecoder
from vfu_dev.migration.schema import Block, MigratableState, blocks_digest, state_digest


class ResumeSession:
    """One incoming migration: `write` slices of the stream, `finish` when no more will come.

    Memory is written as it arrives, register blocks only when everything was verified. Until `finish`
    returned the device must not run: a resume that is given up leaves unverified memory.

    Args: contents: what migrates; nothing of its memories' content outlives the session.

    Attributes:
        digest: of the state as it lies in memory, hex, in the shape that the source has; None until the end
            of the stream was verified.
        initial_ends: how often the source said that all initial data was sent: once, and after each REINIT.
    """

    def __init__(self, contents: MigratableState) -> None:
        self.digest: str | None = None
        self.initial_ends = 0
        self._contents = contents
        self._incoming: Incoming  # from the schema on
        self._blocks: list[bytes] = []  # as they arrived
        self._unpacked: list[tuple[Block, bytes]] = []  # as they take effect
        self._hashes: list[Hashes] = []
        # Where a memory still holds what was there before, by its name.
        self._old: dict[str, npt.NDArray[np.bool_]] = {m.name: m.begin_refill() for m in contents.memories}
        self._decoder = StreamDecoder(contents, self)

    @property
    def received_bytes(self) -> int:
        """Stream bytes taken so far."""
        return self._decoder.received_bytes

    def refuse(self, reason: str) -> StreamError:
        """Give the stream up for `reason`; returns what every later call raises."""
        if self._decoder.failure is None:
            self._decoder.failure = StreamError(reason)
        return self._decoder.failure

    def write(self, data: memoryview) -> None:
        """Take the next slice.

        Raises: StreamError: now and on every later call.
        """
        self._decoder.feed(data)

    def finish(self) -> None:
        """Complete the resume: register blocks take effect.

        Raises: StreamError: something is missing or was wrong; the device must not run.
        """
        self._decoder.finish()
        for block, content in (*self._unpacked, *self._incoming.missing):
            block.unpack_slot(content)

    # --- StreamSink ---------------------------------------------------------------------------------------

    def expect(self, incoming: Incoming) -> None:
        """Keep what the stream's schema says, and judge the defaults that it makes necessary."""
        self._incoming = incoming
        self._hashes = [np.zeros(memory.page_count, dtype=np.uint64) for memory in incoming.memories]
        for block, content in incoming.missing:
            block.validate_slot(content)

    def take_pages(self, memory: int, indices: PageIndices) -> Arriving:
        """Return what stores the pages; one that this device does not have is hashed only."""
        incoming = self._incoming.memories[memory]
        target = incoming.target
        where = None if target is None else Target(target.rows, target.pages.codes, self._old[target.name])
        return Arriving(incoming.page_size_bytes, indices, self._hashes[memory], where)

    def take_zeros(self, memory: int, indices: PageIndices) -> None:
        """Make pages zero; one never written is zero and is not touched, or it would be allocated."""
        target = self._incoming.memories[memory].target
        if target is not None:
            old, codes = self._old[target.name], target.pages.codes
            target.rows[indices[(codes[indices] != CODE_NEVER) | old[indices]]] = 0
            codes[indices] = CODE_ZERO
            old[indices] = False
        self._hashes[memory][indices] = 0

    def take_initial(self) -> None:
        """Note that all initial data has arrived."""
        self.initial_ends += 1

    def take_block(self, block: int, content: bytes) -> None:
        """Keep a block until all is verified."""
        incoming = self._incoming.blocks[block]
        self._blocks.append(content)
        if incoming.target is not None:
            converted = incoming.convert(content)
            incoming.target.validate_slot(converted)
            self._unpacked.append((incoming.target, converted))

    def take_end(self, memory_digests: list[bytes], blocks_digest_sent: bytes) -> None:
        """Clear what the source has not, and compare what lies in memory with what it says it sent."""
        for target in self._contents.memories:
            target.clear_pages(np.flatnonzero(self._old[target.name]))
        ours = [fold_hashes(hashes) for hashes in self._hashes]
        for memory, here, sent in zip(self._incoming.memories, ours, memory_digests, strict=True):
            if here != sent:
                raise StreamError(f"memory {memory.name}: digest {here.hex()}, the source sent {sent.hex()}")
        if blocks_digest(self._blocks) != blocks_digest_sent:
            raise StreamError("the digest of the register blocks differs from the one sent")
        self.digest = state_digest(self._incoming.schema, ours, self._blocks)
