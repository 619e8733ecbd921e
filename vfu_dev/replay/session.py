"""The sessions of a replay: sizes as the profile says, made-up content, and the device's own state within it.

The device's own state travels in STOP_COPY, so that a guest goes on with it. Where a profile leaves no room
for it there, the stream is longer than the profile says, and `overshoot_bytes` says by how much.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from vfu_dev.errors import StreamError
from vfu_dev.memory.kernels import Vectors, bytes_vector, join_vectors
from vfu_dev.memory.pages import PageIndices
from vfu_dev.migration.engine import Migration
from vfu_dev.migration.resume import ResumeSession
from vfu_dev.migration.save import NO_OTHERS, Others, PassRecord, PrecopyInfo, SaveCounters, SaveSession
from vfu_dev.migration.schema import MigratableState
from vfu_dev.migration.sessions import Sessions
from vfu_dev.profile import Profile
from vfu_dev.profile.session import PHASES, Phase
from vfu_dev.replay.draw import draw_of
from vfu_dev.replay.frames import HEADER, Content, FrameKind, FrameReader, header
from vfu_dev.replay.laws import DirtyLaw, known, stop_copy_length

# Of the state's stream, kept back for the last frame: a stream without it is not whole.
_KEPT_BACK_BYTES = 16
# A header, and a byte behind it.
_LEAST_READ_BYTES = HEADER.size + 1


def whole_bytes(profile: Profile) -> int:
    """Return stop_copy_length of a device that is not in PRE_COPY."""
    running = profile.stop_copy.running_bytes
    if running is not None:
        return running.value
    return stop_copy_length(profile, 0.0, int(known(profile.initial.bytes)))


class ReplaySave:
    """An outgoing session; `vfu_dev.migration.sessions.Saving` has the members.

    Attributes:
        began: when PRE_COPY was entered, of `clock`; the arc into it may take its time first.

    Args:
        profile: as scaled.
        contents: the device's own state.
        content: what is made up.
        stopped: the device stands still already.
        counters: of passes, which a replay has none of.
        on_reinit: announces a REINIT; returns whether the client knows of them.
        on_overshoot: called with the bytes beyond what the profile says.
        clock: seconds.
    """

    def __init__(
        self,
        profile: Profile,
        contents: MigratableState,
        content: Content,
        *,
        stopped: bool,
        counters: SaveCounters,
        on_reinit: Callable[[], bool],
        on_overshoot: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stopped = stopped
        self.sent_initial_bytes = 0
        self.pass_list: list[PassRecord] = []
        self._profile = profile
        self._contents = contents
        self._counters = counters
        self._on_reinit, self._on_overshoot = on_reinit, on_overshoot
        self._clock = clock
        self.began = clock()
        self._content = content
        self._initial = 0 if stopped else int(known(profile.initial.bytes))
        self._said = PrecopyInfo(self._initial, 0)
        self._law = DirtyLaw(profile)
        self._reinits = list(profile.reinits)
        self._sizes = {phase: draw_of(getattr(profile.reads, phase).bytes) for phase in PHASES}
        self._state: SaveSession | None = None
        self._own_left = 0  # bytes of its stream
        self._left = 0  # of the made-up bytes of STOP_COPY, frames of the state included
        self._carried = bytearray()  # the rest of a frame for which a read was too small
        self._alive: list[object] = []  # what the last read returned
        if stopped:
            self._settle(whole_bytes(profile))

    # --- sizes --------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Since PRE_COPY was entered."""
        return self._clock() - self.began

    @property
    def ready(self) -> bool:
        """Whether initial data can be read yet; a read before it has none (VFIO: ENOMSG)."""
        return self.stopped or self.seconds >= known(self._profile.initial.ready_seconds)

    @property
    def phase(self) -> Phase:
        """What the next read belongs to, one of PHASES."""
        return "stop_copy" if self.stopped else "initial" if self._initial else "dirty"

    def info(self) -> PrecopyInfo:
        """Return initial_bytes and dirty_bytes now; those of a stopped device are part of its length."""
        if self.stopped:
            return PrecopyInfo(0, 0)
        while self._reinits and self.seconds >= known(self._reinits[0].seconds):
            count = int(known(self._reinits.pop(0).bytes))
            if self._on_reinit():
                self._initial = count
            else:
                self._law.add(count)
        # Their sum with `tail_bytes` is to be the length: what becomes dirty meanwhile is in neither.
        self._said = PrecopyInfo(self._initial, self._law.pending(self.seconds, all_read=not self._initial))
        return self._said

    @property
    def tail_bytes(self) -> int:
        """By how much stop_copy_length exceeds what `info` said last; negative where it is less."""
        if self.stopped:
            return self._left + len(self._carried)
        left = self._said.initial_bytes + self._said.dirty_bytes
        return stop_copy_length(self._profile, self.seconds, left) - left

    def reinit(self, memory: int, pages: PageIndices, *, as_initial: bool) -> None:
        """The device's own pages are sent in STOP_COPY alone: nothing to do."""

    def stop(self) -> None:
        """Fix what STOP_COPY has."""
        info = self.info()
        length = info.initial_bytes + info.dirty_bytes + self.tail_bytes
        self.stopped = True
        self._settle(length)

    def _settle(self, length: float) -> None:
        carried = self._profile.stop_copy.carried_bytes
        self._left = int(length if carried is None else carried.value)
        self._state = SaveSession(self._contents, stopped=True, counters=self._counters)
        self._own_left = self._count_own()

    # --- reading ------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether all was read."""
        return self._state is not None and self._state.ended and not self._carried

    @property
    def digest(self) -> str | None:
        """Of the device's own state."""
        return None if self._state is None else self._state.digest

    @property
    def block_contents(self) -> list[bytes]:
        """The register blocks as sent."""
        return [] if self._state is None else self._state.block_contents

    def read(self, max_bytes: int) -> tuple[Vectors, int]:
        """Return the next bytes, as many as a read of the profile has, `max_bytes` at most."""
        self._alive = []
        if not self.ready:
            return self._done([])
        phase = self.phase
        info = self.info()
        want = self._want(phase, max_bytes)
        if phase == "stop_copy":
            return self._read_carried(max_bytes) or self._read_stopped(want, max_bytes)
        left = info.initial_bytes if phase == "initial" else info.dirty_bytes
        count = min(want, left)
        if not count:
            return np.empty((0, 2), dtype=np.uint64), 0
        kind = FrameKind.DIRTY
        if phase == "initial":
            kind = FrameKind.INITIAL_LAST if count == left else FrameKind.INITIAL
            self._initial -= count
            self.sent_initial_bytes += count
        else:
            self._law.took(count)
        return self._done(self._made_up(kind, count))

    def read_into(self, buffer: memoryview, others: Others = NO_OTHERS) -> int:
        """Store the next bytes, and return their number."""
        return join_vectors(self.read(len(buffer))[0], buffer)

    def _want(self, phase: Phase, max_bytes: int) -> int:
        draw = self._sizes[phase]
        if draw is None:
            return max_bytes
        drawn = int(draw())
        full = self._profile.reads.buffer_bytes
        if full is not None and drawn >= full.value:
            return max_bytes
        return max(1, min(drawn, max_bytes))

    def _made_up(self, kind: FrameKind, count: int) -> list[Vectors]:
        """Return a frame of `count` bytes, header included; without room for one, zero bytes."""
        if count < HEADER.size:
            return [self._keep(bytes(count))]
        pieces = self._content.pieces(count - HEADER.size)
        return [self._keep(header(kind, pieces)), *(bytes_vector(piece) for piece in pieces)]

    def _keep(self, data: bytes) -> Vectors:
        self._alive.append(data)
        return bytes_vector(data)

    def _done(self, vectors: list[Vectors]) -> tuple[Vectors, int]:
        whole = np.concatenate(vectors) if vectors else np.empty((0, 2), dtype=np.uint64)
        return whole, int(whole[:, 1].sum())

    def _read_carried(self, max_bytes: int) -> tuple[Vectors, int] | None:
        """Return a part of a frame that a client's reads are too small for; None where a read has room."""
        if not self._carried:
            if max_bytes > HEADER.size or self.ended:
                return None
            frame, count = self._read_stopped(_LEAST_READ_BYTES, _LEAST_READ_BYTES)
            self._carried = bytearray(count)
            join_vectors(frame, memoryview(self._carried))
        part = bytes(self._carried[:max_bytes])
        del self._carried[:max_bytes]
        return self._done([self._keep(part)])

    def _read_stopped(self, want: int, max_bytes: int) -> tuple[Vectors, int]:
        """Return the next bytes of STOP_COPY: its last frame is the end of the device's own state."""
        assert self._state is not None
        if self._state.ended:
            return self._done([])
        if self._left > want and (room := self._left - HEADER.size - _KEPT_BACK_BYTES) > 0:
            return self._read_some(min(want, room))
        filler = self._left - HEADER.size - self._own_left
        if 0 <= filler <= max_bytes - HEADER.size - self._own_left:
            self._left = 0
            made_up = self._made_up(FrameKind.STOP_COPY, filler) if filler else []
            return self._done([*made_up, *self._own(self._own_left)])
        # No room, or none any more: the stream is longer than the profile says.
        size = max(1, min(self._own_left, max(want, self._left) - HEADER.size, max_bytes - HEADER.size))
        self._on_overshoot(max(0, size + HEADER.size - self._left))
        self._left = max(0, self._left - size - HEADER.size)
        return self._done(self._own(size))

    def _read_some(self, count: int) -> tuple[Vectors, int]:
        """Return `count` bytes, of the device's own state first."""
        size = min(self._own_left - _KEPT_BACK_BYTES, count - HEADER.size)
        vectors = self._own(size) if size > 0 else []
        rest = count - size - HEADER.size if vectors else count
        if rest:
            vectors += self._made_up(FrameKind.STOP_COPY, rest)
        self._left -= count
        return self._done(vectors)

    def _own(self, count: int) -> list[Vectors]:
        """Return a frame with the next `count` bytes of the device's own state."""
        assert self._state is not None
        vectors, stored = self._state.read(count)
        self._own_left -= stored
        ended = self._state.ended
        if not ended and self._own_left <= 0:  # mapped memory, in which a scan found more
            self._own_left = self._count_own()
        return [self._keep(header(FrameKind.STATE_LAST if ended else FrameKind.STATE, [], stored)), vectors]

    def _count_own(self) -> int:
        assert self._state is not None
        info = self._state.info()
        return info.initial_bytes + info.dirty_bytes + self._state.tail_bytes


class ReplayResume:
    """An incoming session; `vfu_dev.migration.sessions.Receiving` has the members."""

    def __init__(self, contents: MigratableState) -> None:
        self.initial_ends = 0
        self.phase: Phase = "initial"  # of the last frame, one of PHASES
        self.loaded = False  # whether the time for loading initial data has passed
        self.received_bytes = 0
        self.own_bytes = 0  # of them: the device's own state
        self._state = ResumeSession(contents)
        self._reader = FrameReader(self._own, self._framed)
        self._failure: StreamError | None = None

    @property
    def digest(self) -> str | None:
        """Of the device's own state, once it was verified."""
        return self._state.digest

    def _own(self, data: memoryview) -> None:
        self.own_bytes += len(data)
        self._state.write(data)

    def _framed(self, kind: FrameKind) -> None:
        match kind:
            case FrameKind.INITIAL | FrameKind.INITIAL_LAST:
                self.phase = "initial"
            case FrameKind.DIRTY:
                self.phase = "dirty"
            case _:
                self.phase = "stop_copy"
        self.initial_ends += kind is FrameKind.INITIAL_LAST

    def refuse(self, reason: str) -> StreamError:
        """Give the stream up."""
        if self._failure is None:
            self._failure = self._state.refuse(reason)
        return self._failure

    def write(self, data: memoryview) -> None:
        """Take the next slice. Raises: StreamError: now and on every later call."""
        if self._failure is not None:
            raise self._failure
        self.received_bytes += len(data)
        try:
            self._reader.feed(data)
        except StreamError as error:
            self._failure = error
            raise

    def finish(self) -> None:
        """Complete it. Raises: StreamError: something is missing or was wrong."""
        if self._failure is not None:
            raise self._failure
        if not self._reader.whole:
            raise self.refuse("the replay's stream ends before its last frame")
        self._state.finish()


class ReplaySessions(Sessions):
    """Makes the sessions of a device that behaves as a profile says.

    Args:
        profile: as scaled.
        migration: the device's, which takes the sessions from here.

    Attributes:
        overshoot_bytes: of all sessions so far: beyond what the profile says, for the device's own state.
    """

    def __init__(self, profile: Profile, migration: Migration) -> None:
        self.profile = profile
        self.overshoot_bytes = 0
        self.saving: ReplaySave | None = None  # the most recent ones
        self.receiving: ReplayResume | None = None
        self._content = Content(known(profile.content.compressibility))
        self._migration = migration
        migration.sessions = self

    def save(
        self,
        contents: MigratableState,
        initial_limit_bytes: int | None,
        stopped: bool,
        counters: SaveCounters,
    ) -> ReplaySave:
        """See `Sessions`; the profile alone says what is initial."""
        self.saving = ReplaySave(
            self.profile,
            contents,
            self._content,
            stopped=stopped,
            counters=counters,
            on_reinit=self._migration.announce_reinit,
            on_overshoot=self._overshot,
        )
        return self.saving

    def resume(self, contents: MigratableState) -> ReplayResume:
        """See `Sessions`."""
        self.receiving = ReplayResume(contents)
        return self.receiving

    def whole_bytes(self, contents: MigratableState) -> int:
        """See `Sessions`."""
        return whole_bytes(self.profile)

    def _overshot(self, count: int) -> None:
        self.overshoot_bytes += count
