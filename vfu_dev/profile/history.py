"""What is observed of one device over one or many migrations, by QEMU's trace or by calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vfu_dev.profile.session import (
    ArcTally,
    CallTallies,
    Duration,
    Incoming,
    Marks,
    Outgoing,
    Phase,
    Reinited,
)
from vfu_dev.uapi import DeviceState, MigrationFlags

SAVING = (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P, DeviceState.STOP_COPY)
PRE_COPY = (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P)
MAX_REINITS = 1000
MAX_MARKS = 10_000
MAX_EXTRAS = 100
# What QEMU takes for the size of a device that does not say (hw/vfio/migration.c, VFIO_MIG_STOP_COPY_SIZE).
SIZE_OF_SILENCE = 100 << 30


@dataclass(frozen=True)
class Announced:
    """What a device announced."""

    flags: MigrationFlags
    reinit: bool
    dma_logging: bool | None  # None: not seen


class History:
    """One device in one process: told what happens, in order.

    Args:
        only: number of the one migration that counts, from 1; None: all.
        marks: of each incoming migration, where they are known.

    Attributes:
        state: None: not known.
        clock_set_back: where the trace's clock went back within a migration, in words; empty: nowhere.
        marks: of each outgoing migration.
        outgoing, incoming: the migration that is under way, or was the last.
        kept: the outgoing migration that sizes and curves are of: the last that completed, else the last.
        arcs: FROM->TO by side.
    """

    def __init__(self, only: int | None = None, marks: Sequence[Marks] = ()) -> None:
        self._only = only
        self._given = marks
        # On which side changes of state are, None between migrations.
        self._side: Literal["source", "destination"] | None = None
        self.state: DeviceState | None = None
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        self.kept: Outgoing | None = None
        self.kept_incoming: Incoming | None = None
        self.reads, self.writes = CallTallies(), CallTallies()
        self.arcs: dict[str, dict[str, ArcTally]] = {"source": {}, "destination": {}}
        self.counts = {"outgoing": 0, "incoming": 0, "completed": 0, "arrived": 0}
        self.buffer_bytes = 0
        self.set_up_at: float | None = None
        self.initials: set[int] = set()
        self.running_length: int | None = None
        self._length_before: int | None = None
        self.announced: Announced | None = None
        self.states: set[DeviceState] = set()
        self.without_precopy = False
        # Whether MIG_DATA_SIZE says something; `measured`: its errno was seen.
        self.says_size: bool | None = None
        self.says_size_measured = False
        self.reinit_told = False
        self.marks: list[Marks] = []
        self.cut_off = False
        self.clock_set_back = ""  # within a migration: where first, in words
        self.last_read_at: float | None = None
        self.found_end = False  # by the last read

    # --- states -------------------------------------------------------------------------------------------

    def asked(self, target: DeviceState, at: float | None) -> None:
        """The client asks for a state."""
        if self.state is None and target in (DeviceState.PRE_COPY, DeviceState.RESUMING):
            self.state = DeviceState.RUNNING  # no client asks for them elsewhere
        if target in SAVING and self._now() is None and self.state not in SAVING:
            begins = DeviceState.STOP if target is DeviceState.STOP_COPY else DeviceState.RUNNING
            self.begin_outgoing(whole=self.state is begins)
        elif target is DeviceState.RESUMING:
            self.begin_incoming()
        if (
            self.outgoing is not None
            and self.state is DeviceState.PRE_COPY
            and target is not DeviceState.PRE_COPY
            and self.outgoing.stopping_at is None
        ):
            self.outgoing.stopping_at = at

    def start(self) -> None:
        """The device is as it is at the start of a client, or after a reset: what was under way is over."""
        self.end_outgoing()
        self.end_incoming()
        self._side = None
        self.state = DeviceState.RUNNING

    def reached(self, target: DeviceState, at: float | None, took: Duration) -> None:
        """The device is there."""
        origin, self.state = self.state, target
        self.states.add(target)
        counts = self._counts_incoming if self._side == "destination" else self._counts_outgoing
        if self._side and counts and origin not in (None, target) and took.seconds is not None:
            assert origin is not None
            arc = self.arcs[self._side].setdefault(f"{origin.name}->{target.name}", ArcTally())
            arc.times.add(took.seconds)
            arc.exact = arc.exact and took.exact
        if target is DeviceState.RUNNING and self._now() is None:
            self._side = None
        if target is DeviceState.PRE_COPY and self.outgoing is not None and origin is not target:
            self.outgoing.precopy_at = at

    @property
    def _counts_outgoing(self) -> bool:
        return self.outgoing is not None and self._only in (None, self.counts["outgoing"])

    @property
    def _counts_incoming(self) -> bool:
        return self.incoming is not None and self._only in (None, self.counts["incoming"])

    # --- outgoing -----------------------------------------------------------------------------------------

    def begin_outgoing(self, *, whole: bool) -> Outgoing:
        """A migration begins here."""
        self.end_outgoing()
        self.end_incoming()
        self._side = "source"
        self.counts["outgoing"] += 1
        self.outgoing = Outgoing(whole)
        if self._counts_outgoing:
            self.reads.begin()
            if self._length_before is not None:
                self.running_length = self._length_before
        self._length_before = None
        return self.outgoing

    def set_up(self, at: float | None, buffer_bytes: int) -> None:
        """The client has a buffer to read into."""
        self.set_up_at = at
        if self._now() is None:
            # A device without PRE_COPY: nothing was asked of it yet.
            self.begin_outgoing(whole=True)
            self.without_precopy = True
        if self._counts_outgoing:
            self.buffer_bytes = max(self.buffer_bytes, buffer_bytes)

    def sizes(
        self,
        at: float | None,
        initial: int,
        dirty: int,
        *,
        reinit: bool = False,
        asked_at: float | None = None,
    ) -> None:
        """The device says what is left in PRE_COPY; `asked_at`: when it was asked, if that is known."""
        one = self._now()
        if one is None or self.state not in PRE_COPY:
            return
        if one.initial is None:
            one.initial = one.initial_left = initial
        elif reinit:
            added = max(0, initial - one.initial_left)
            one.reinit_bytes += added
            self.reinit_told = True
            if len(one.reinits) < MAX_REINITS:
                # What was read since the last question may have been part of it.
                most = initial + one.precopy_bytes - one.read_when_asked
                one.reinits.append(Reinited(one.asked_at, at, initial, most))
        one.initial_left = initial
        # What appears while the answer is on its way is not in it.
        one.asked_at, one.read_when_asked = at if asked_at is None else asked_at, one.precopy_bytes
        self._dirtied(one, at, initial + dirty)

    def _dirtied(self, one: Outgoing, at: float | None, left: int) -> None:
        if one.initial is None:
            return
        total = max(0, left + one.precopy_bytes - one.initial - one.reinit_bytes)
        one.dirtied_most = max(one.dirtied_most, total)
        one.dirtied_last = total
        if at is not None and one.precopy_at is not None:
            one.dirtied.add(max(0.0, at - one.precopy_at), total)

    def length_before(self, length: int | None) -> None:
        """The device says stop_copy_length outside PRE_COPY; it counts if a migration begins next."""
        self._length_before = length if self.state in (None, DeviceState.RUNNING) else None

    def length_asked(self) -> None:
        """The client asks for stop_copy_length next, and then for what is left."""
        if (one := self._now()) is not None:
            one.appeared_before = one.appeared

    def length(self, at: float | None, length: int, left: int) -> None:
        """The device said stop_copy_length, and then `left`, which is initial_bytes + dirty_bytes."""
        one = self._now()
        if one is None or self.state not in PRE_COPY:
            return
        one.lengths_seen += 1
        low, high = one.length_range or (length, length)
        one.length_range = (min(low, length), max(high, length))
        if len(one.extras) < MAX_EXTRAS or length - left in one.extras:
            one.extras[length - left] = one.extras.get(length - left, 0) + 1
        # What appeared between the two answers is in `left` alone. No more did than since the answer before.
        most = length - left + max(0.0, one.appeared - one.appeared_before)
        one.extra_most = most if one.extra_most is None else min(one.extra_most, most)
        one.appeared_before = one.appeared
        if at is not None and one.precopy_at is not None:
            one.lengths.add(max(0.0, at - one.precopy_at), length)

    def read(self, at: float | None, size: int, took: Duration) -> None:
        """The client read `size` bytes."""
        one = self._now()
        if one is None:
            return
        if one.first_read_at is None:
            one.first_read_at = at
        if self.state in PRE_COPY:
            phase: Phase = "initial" if one.initial_left > 0 else "dirty"
            one.initial_left = max(0, one.initial_left - size)
            one.precopy_bytes += size
        else:
            phase = "stop_copy"
            one.stop_copy_bytes += size
        if self._counts_outgoing:
            self.reads.add(phase, size, took)

    def empty(self, at: float | None) -> None:
        """A read in PRE_COPY found nothing."""
        one = self._now()
        if one is None or self.state not in PRE_COPY:
            return
        if one.initial_left > 0:
            one.empty_with_initial = True
        else:
            self._dirtied(one, at, 0)

    def unread(self) -> None:
        """STOP_COPY's data is read where it is not seen."""
        if (one := self._now()) is not None:
            one.unseen = True

    @property
    def no_sizes(self) -> bool:
        """Whether a migration is in PRE_COPY and the device has not said what there is."""
        one = self._now()
        return one is not None and one.initial is None and self.state in PRE_COPY

    def read_out(self, at: float | None, ok: bool) -> None:
        """STOP_COPY has no more data."""
        if (one := self._now()) is not None and ok:
            one.completed = True
            one.read_out_at = at

    @property
    def is_sending(self) -> bool:
        """Whether an outgoing migration is under way."""
        return self._now() is not None

    @property
    def is_receiving(self) -> bool:
        """Whether an incoming migration is under way."""
        return self.incoming is not None and not self.incoming.ended

    def set_clock_back(self, where: str) -> None:
        """The clock of `at` was set back: no time before it says how long something took that ends later."""
        if not self.is_sending and not self.is_receiving:
            return
        self.clock_set_back = self.clock_set_back or where
        if (one := self._now()) is not None:
            one.precopy_at = one.stopping_at = None

    @property
    def migrations(self) -> int:
        """How many, in or out."""
        return self.counts["outgoing"] + self.counts["incoming"]

    def finish(self) -> None:
        """There is no more: what is under way is cut off."""
        self.cut_off = self.is_sending or self.is_receiving
        self.end_outgoing()
        self.end_incoming()

    def end_outgoing(self) -> None:
        """The client is done with it."""
        one = self.outgoing
        if one is None or one.ended:
            return
        one.ended = True
        if len(self.marks) < MAX_MARKS:
            known = one.whole and one.completed
            self.marks.append(Marks(one.initial, one.precopy_bytes if known else None))
        self._keep(one)

    def _keep(self, one: Outgoing) -> None:
        if not self._counts_outgoing:
            return
        self.counts["completed"] += one.completed
        if one.initial is not None and len(self.initials) < MAX_REINITS:
            self.initials.add(one.initial)
        if self.kept is None or one.completed or not self.kept.completed:
            self.kept = one

    def _now(self) -> Outgoing | None:
        return self.outgoing if self.outgoing is not None and not self.outgoing.ended else None

    # --- incoming -----------------------------------------------------------------------------------------

    def begin_incoming(self) -> None:
        """A migration comes in."""
        self.end_incoming()
        self._side = "destination"
        self.counts["incoming"] += 1
        self.incoming = Incoming()
        if self._counts_incoming:
            self.writes.begin()

    def write(self, size: int | None, took: Duration) -> None:
        """The client wrote `size` bytes; None: their number is not seen, they are STOP_COPY's."""
        one = self.incoming
        if one is None or one.ended:
            return
        number = self.counts["incoming"]
        marks = self._given[number - 1] if number <= len(self._given) else Marks(None, None)
        phase: Phase = "dirty"
        if size is None or (marks.precopy is not None and one.written >= marks.precopy):
            phase = "stop_copy"
        elif not one.initial_sent and marks.initial is not None and one.written < marks.initial:
            phase = "initial"
        one.written += size or 0
        one.last_write = took
        if marks.initial is not None and one.written >= marks.initial:
            self.initial_written()
        if self._counts_incoming:
            self.writes.add(phase, size, took)

    def initial_written(self) -> None:
        """The initial data is complete at the destination."""
        one = self.incoming
        if one is not None and not one.initial_sent:
            one.initial_sent = True
            one.last_initial = one.last_write

    def arrived(self) -> None:
        """The device's configuration came, which is last."""
        if self.incoming is not None:
            self.incoming.completed = True

    def end_incoming(self) -> None:
        """The client is done with it."""
        one = self.incoming
        if one is None or one.ended:
            return
        one.ended = True
        if self._counts_incoming:
            self.counts["arrived"] += one.completed
            if self.kept_incoming is None or one.completed or not self.kept_incoming.completed:
                self.kept_incoming = one
