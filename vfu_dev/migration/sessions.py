"""What a migration needs of its sessions, and who makes them: by default those of the device's state."""

from __future__ import annotations

from typing import Protocol

from vfu_dev.errors import StreamError
from vfu_dev.memory.kernels import Vectors
from vfu_dev.memory.pages import PageIndices
from vfu_dev.migration.plan import whole_state_bytes
from vfu_dev.migration.resume import ResumeSession
from vfu_dev.migration.save import NO_OTHERS, Others, PassRecord, PrecopyInfo, SaveCounters, SaveSession
from vfu_dev.migration.schema import MigratableState


class Saving(Protocol):
    """An outgoing session; `SaveSession` describes the members. Bytes are those of its stream."""

    stopped: bool
    sent_initial_bytes: int
    pass_list: list[PassRecord]

    @property
    def digest(self) -> str | None:
        """Digest of the state that was sent, once it was."""

    @property
    def ended(self) -> bool:
        """Whether all was read."""

    @property
    def block_contents(self) -> list[bytes]:
        """The register blocks as sent."""

    @property
    def tail_bytes(self) -> int:
        """By how much stop_copy_length exceeds initial_bytes and dirty_bytes."""

    def stop(self) -> None:
        """Note that the device stands still."""

    def reinit(self, memory: int, pages: PageIndices, *, as_initial: bool) -> None:
        """Send these pages again."""

    def info(self) -> PrecopyInfo:
        """Return initial_bytes and dirty_bytes."""

    def read(self, max_bytes: int) -> tuple[Vectors, int]:
        """Return where the next bytes are, and their number."""

    def read_into(self, buffer: memoryview, others: Others = NO_OTHERS) -> int:
        """Store the next bytes, and return their number."""


class Receiving(Protocol):
    """An incoming session; `ResumeSession` describes the members."""

    initial_ends: int

    @property
    def digest(self) -> str | None:
        """Digest of the state that was verified, once it was."""

    @property
    def received_bytes(self) -> int:
        """Bytes taken so far."""

    def refuse(self, reason: str) -> StreamError:
        """Give the stream up."""

    def write(self, data: memoryview) -> None:
        """Take the next slice."""

    def finish(self) -> None:
        """Complete it."""


class Sessions:
    """Makes the sessions of a device's own state."""

    def save(
        self,
        contents: MigratableState,
        initial_limit_bytes: int | None,
        stopped: bool,
        counters: SaveCounters,
    ) -> Saving:
        """Begin an outgoing session; the arguments are those of `SaveSession`."""
        return SaveSession(
            contents, initial_limit_bytes=initial_limit_bytes, stopped=stopped, counters=counters
        )

    def resume(self, contents: MigratableState) -> Receiving:
        """Begin an incoming one."""
        return ResumeSession(contents)

    def whole_bytes(self, contents: MigratableState) -> int:
        """Return stop_copy_length while no session is under way."""
        return whole_state_bytes(contents)
