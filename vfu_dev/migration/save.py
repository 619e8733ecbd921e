"""The outgoing session: it answers reads with stream bytes, and knows exactly how many are left at any time.

`initial_bytes` and `dirty_bytes` are stream bytes, framing included. If nothing changes in between, the
client reads exactly the bytes that were announced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from vfu_dev.memory import fold_hashes
from vfu_dev.memory.kernels import Vectors, bytes_address
from vfu_dev.memory.pages import PageIndices
from vfu_dev.migration.outgoing import Outgoing
from vfu_dev.migration.plan import FINAL_SCAN_SECONDS, PASS_SCAN_SECONDS, PassPlan
from vfu_dev.migration.schema import MigratableState, blocks_digest
from vfu_dev.migration.stream import (
    INITIAL_END_BYTES,
    RecordType,
    StreamEncoder,
    prelude_bytes,
    tail_bytes,
)

# Bytes that are sent whether they changed or not, while it is not known which did.
_FILL_BYTES = 1 << 20

# Interval of the poll for waiting requests within a read.
BETWEEN_SECONDS = 10e-6

# Keep the most recent passes of a session; every `status` reply includes them.
PASSES_KEPT = 200


class Others(NamedTuple):
    """Those who want something in the middle of a read, such as a vCPU that waits for its access.

    Attributes:
        fd: readable when there is something to serve; -1: never.
        serve: serves what there is.
    """

    fd: int
    serve: Callable[[], None]


NO_OTHERS = Others(-1, lambda: None)


@dataclass(frozen=True)
class PrecopyInfo:
    """struct vfio_precopy_info: the stream bytes that reads would find now."""

    initial_bytes: int
    dirty_bytes: int


@dataclass
class SaveCounters:
    """Totals of one session."""

    passes: int = 0
    pages_sent: int = 0
    pages_resent: int = 0
    zero_pages: int = 0


@dataclass
class PassRecord:
    """One pass over what was dirty when it began; it ends where the next one begins.

    Attributes:
        time: when it began, Unix time.
        phase: what it sends: `initial` or `dirty` data of PRE_COPY, or what is left in `stop_copy`.
        stream_bytes: of the records made so far, framing included.
    """

    time: float
    phase: str
    pages: int = 0
    stream_bytes: int = 0


class _Kind(Enum):
    """Which promise a record redeems."""

    INITIAL = 0
    DIRTY = 1
    TAIL = 2


class SaveSession:
    """One outgoing migration.

    Args:
        contents: what migrates; every page ever written becomes dirty again.
        initial_limit_bytes: how many bytes of written memory count as initial, lowest first; None for all.
        stopped: the device stands still: everything is sent, the end included.
        cold_first: the policy of `PassPlan`.
        counters: where this session counts, all zeros at first; its own by default.

    Attributes:
        stopped: the device stands still, see `stop`.
        digest: of the state that was sent, hex; None until the end record was made.
        sent_initial_bytes: stream bytes read so far that were promised as initial.
        pass_list: the last PASSES_KEPT passes.
    """

    def __init__(
        self,
        contents: MigratableState,
        *,
        initial_limit_bytes: int | None = None,
        stopped: bool = False,
        cold_first: bool = True,
        counters: SaveCounters | None = None,
    ) -> None:
        self.stopped = stopped
        self.counters = SaveCounters() if counters is None else counters
        self.digest: str | None = None
        self.sent_initial_bytes = 0
        self.pass_list: list[PassRecord] = []
        self._contents = contents
        self._encoder = StreamEncoder()
        share = 1 / max(1, len(contents.memories))
        self._plans = [PassPlan(memory, cold_first, share) for memory in contents.memories]
        left = initial_limit_bytes
        for plan in self._plans:
            chosen = plan.choose_initial(left)
            left = None if left is None else max(0, left - chosen)
        self._prelude_made = False
        self._initial_told = False  # that all of it is sent
        self._initial_pass = True
        self._tail_bytes = tail_bytes(contents)  # not made yet
        self._blocks: list[bytes] = []  # made so far
        self._outgoing = Outgoing()
        self._kind = _Kind.INITIAL  # of the record being sent
        self._deadline = math.inf  # of scans of mapped memory within one read
        if stopped:
            self.stop()

    def stop(self) -> None:
        """Note that the device stands still from now on: the end can be sent."""
        self.stopped = True
        for plan in self._plans:
            plan.stop()

    def reinit(self, memory: int, pages: PageIndices, *, as_initial: bool) -> None:
        """Send `pages` of the memory with index `memory` again: the device has changed their meaning.

        Args: as_initial: the client knows that initial_bytes may rise; otherwise the pages only become
              dirty.
        """
        if not as_initial:
            self._plans[memory].memory.pages.mark_pages(pages)
            return
        self._plans[memory].add_initial(pages)
        self._initial_told = self._initial_told and not len(pages)
        # What is initial is read first: the next read plans anew.
        for plan in self._plans:
            plan.drop_pass()

    @property
    def ended(self) -> bool:
        """Whether the stream was read to its end."""
        return self.digest is not None and not self._outgoing.left_bytes

    @property
    def block_contents(self) -> list[bytes]:
        """The register blocks as they were sent, so far."""
        return self._blocks

    def info(self) -> PrecopyInfo:
        """Return the bytes that could be read now without a stop; scans pages written since the last scan."""
        initial = 0 if self._prelude_made else prelude_bytes(self._contents)
        initial += 0 if self._initial_told else INITIAL_END_BYTES
        dirty = 0
        if self._kind is _Kind.INITIAL:
            initial += self._outgoing.left_bytes
        elif self._kind is _Kind.DIRTY:
            dirty += self._outgoing.left_bytes
        for plan in self._plans:
            plan_initial, plan_dirty = plan.remaining()
            initial += plan_initial
            dirty += plan_dirty
        return PrecopyInfo(initial, dirty)

    @property
    def tail_bytes(self) -> int:
        """Bytes that only STOP_COPY can carry and that were not read yet."""
        return self._tail_bytes + (self._outgoing.left_bytes if self._kind is _Kind.TAIL else 0)

    def read_into(self, buffer: memoryview, others: Others = NO_OTHERS) -> int:
        """Fill `buffer` as far as there is anything to send; returns the bytes stored.

        Args: buffer: may be memory that the client writes to, and is not read.
              others: those who want something of the device meanwhile, and may write to it.
        """
        self._deadline = time.monotonic() + FINAL_SCAN_SECONDS
        outgoing = self._outgoing
        outgoing.begin_read()
        address, size = bytes_address(buffer), len(buffer)
        stored, due = 0, 0.0
        while stored < size:
            if time.perf_counter() >= due:
                others.serve()
                due = time.perf_counter() + BETWEEN_SECONDS
            if outgoing.left_bytes:
                stored += self._counted(outgoing.fill(address + stored, size - stored, others.fd))
            elif not self._next_record():
                break
        return stored

    def read(self, max_bytes: int) -> tuple[Vectors, int]:
        """Return where the next stream bytes are, in order, and their number: `max_bytes` unless fewer are
        left.

        Fewer means that nothing more is left now while the device runs, and the end once it stopped. The
        vectors point into device memory and buffers of this session. They hold until the next call here or
        the next write to the device, whichever is first: copy or send them before.
        """
        self._deadline = time.monotonic() + FINAL_SCAN_SECONDS
        outgoing = self._outgoing
        outgoing.begin_read()
        while outgoing.taken_bytes < max_bytes and (outgoing.left_bytes or self._next_record()):
            self._counted(outgoing.take(max_bytes - outgoing.taken_bytes))
        return outgoing.taken, outgoing.taken_bytes

    def _counted(self, count: int) -> int:
        if self._kind is _Kind.INITIAL:
            self.sent_initial_bytes += count
        return count

    def _next_record(self) -> bool:
        """Make the next record; False when there is nothing to send now, or ever again."""
        if not self._prelude_made:
            self._prelude_made = True
            self._send(_Kind.INITIAL, self._encoder.prelude(self._contents.schema))
            return True
        if (
            not self._blocks
            and self.digest is None
            and (self._next_pages() or self._tell_initial() or (self._start_pass() and self._next_pages()))
        ):
            return True
        if not self.stopped:
            return False
        if not self._blocks and self.digest is None:
            for plan in self._plans:
                if not plan.settled:
                    # Too large to be scanned within one read, and a short reply would end the stream: send
                    # any pages until the scan has shown that nothing is left.
                    plan.make_dirty(_FILL_BYTES)
                    return self._start_pass() and self._next_pages()
        return self._next_of_tail()

    def _send(self, kind: _Kind, record: bytes) -> None:
        self._outgoing.put(record)
        self._sent(kind)

    def _sent(self, kind: _Kind) -> None:
        self._kind = kind
        if kind is not _Kind.TAIL and self.pass_list:  # the prelude comes before the first pass
            self.pass_list[-1].stream_bytes += self._outgoing.left_bytes

    def _tell_initial(self) -> bool:
        """Between two passes: announce once that initial data is complete; False if there is none."""
        if self._initial_told or any(plan.initial.any() for plan in self._plans):
            return False
        self._initial_told = True
        self._send(_Kind.INITIAL, self._encoder.record(RecordType.INITIAL, 0, 0, b""))
        return True

    def _start_pass(self) -> bool:
        """Plan the next pass over all memories: over initial pages alone as long as there are any."""
        self._initial_pass = any(plan.initial.any() for plan in self._plans)
        scan_seconds = PASS_SCAN_SECONDS
        if self.stopped:
            scan_seconds = max(0.0, min(FINAL_SCAN_SECONDS, self._deadline - time.monotonic()))
        started = [plan.start_pass(self._initial_pass, scan_seconds) for plan in self._plans]  # each has to
        found = any(started)
        if found:
            self.counters.passes += 1
            phase = "stop_copy" if self.stopped else "initial" if self._initial_pass else "dirty"
            self.pass_list.append(PassRecord(time.time(), phase))
            del self.pass_list[:-PASSES_KEPT]
        return found

    def _next_pages(self) -> bool:
        """Make a record of the next pages of the pass under way; False when it is through."""
        for index, plan in enumerate(self._plans):
            zeros = plan.take_zeros()
            if len(zeros):
                self._send_zeros(index, plan, zeros)
                return True
            pages = plan.take_data()
            if len(pages):
                self._send_pages(index, plan, pages)
                return True
        return False

    def _count(self, plan: PassPlan, taken: PageIndices) -> _Kind:
        sends = plan.sends[taken]
        self.counters.pages_sent += len(taken)
        self.pass_list[-1].pages += len(taken)
        self.counters.pages_resent += int(np.count_nonzero(sends))
        plan.sends[taken] = sends + (sends < np.iinfo(np.uint8).max)
        return _Kind.INITIAL if self._initial_pass else _Kind.DIRTY

    def _send_zeros(self, index: int, plan: PassPlan, taken: PageIndices) -> None:
        kind = self._count(plan, taken)
        self.counters.zero_pages += len(taken)
        plan.sent_zeros(taken)
        indices = taken.astype("<u4").tobytes()
        self._send(kind, self._encoder.record(RecordType.ZEROS, index, len(taken), indices))

    def _send_pages(self, index: int, plan: PassPlan, taken: PageIndices) -> None:
        kind = self._count(plan, taken)
        self._outgoing.put_pages(plan.record, self._encoder.pages(index, plan.record, taken))
        self._sent(kind)

    def _next_of_tail(self) -> bool:
        """Make the next register block or the end record; False when all was made."""
        blocks = self._contents.blocks
        if len(self._blocks) < len(blocks):
            content = blocks[len(self._blocks)].pack_slot()
            record = self._encoder.record(RecordType.BLOCK, len(self._blocks), 0, content)
            self._blocks.append(content)
        elif self.digest is None:
            digests = [fold_hashes(plan.hashes) for plan in self._plans]
            self.digest = self._contents.digest(digests, self._blocks)
            body = b"".join([*digests, blocks_digest(self._blocks)])
            record = self._encoder.record(RecordType.END, 0, 0, body)
        else:
            return False
        self._send(_Kind.TAIL, record)
        self._tail_bytes -= self._outgoing.left_bytes
        return True
