"""One device's migration: its current state, its sessions, and how they ended."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from vfu_dev.errors import StateError, VfuDevError
from vfu_dev.figures.totals import interrupted_result
from vfu_dev.memory import DeviceMemory
from vfu_dev.memory.kernels import Vectors
from vfu_dev.memory.pages import PageIndices
from vfu_dev.migration.audit import Audit
from vfu_dev.migration.fsm import ALL_FLAGS, PRE_COPY_GROUP, RUNNING_GROUP, SAVING_GROUP, Action, StateMachine
from vfu_dev.migration.observer import Observer
from vfu_dev.migration.records import SaveRecord, Transition, log_state_change
from vfu_dev.migration.resuming import Resuming
from vfu_dev.migration.save import NO_OTHERS, Others, PrecopyInfo
from vfu_dev.migration.schema import MigratableState
from vfu_dev.migration.sessions import Saving, Sessions
from vfu_dev.uapi import DeviceState, MigrationFlags

logger = logging.getLogger(__name__)

_TRANSITIONS_KEPT = 1000
T = TypeVar("T")


class Migration:
    """Migration of one device. Everything here runs in the one thread that touches the device.

    Args:
        name: the device, for logs.
        contents: what migrates.
        flags: what the device announces.
        initial_limit_bytes: see `SaveSession`.
        on_state: called after each change with the new state.
        on_resumed: called when a resume was completed, before the device may run.
        on_unverified: called when a resume was given up: memory holds unverified content, to be cleared.
    """

    def __init__(
        self,
        name: str,
        contents: MigratableState,
        *,
        flags: MigrationFlags = ALL_FLAGS,
        initial_limit_bytes: int | None = None,
        on_state: Callable[[DeviceState], None] = lambda _: None,
        on_resumed: Callable[[], None] = lambda: None,
        on_unverified: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.contents = contents
        self.machine = StateMachine(flags)
        self.state = DeviceState.RUNNING  # "initial device state … RUNNING", vfio-user.rst
        self.transitions: deque[Transition] = deque(maxlen=_TRANSITIONS_KEPT)
        self.observer = Observer()
        self.sessions = Sessions()  # may be replaced while none is under way
        # VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, see <linux/vfio.h> of Linux 7.1.
        self.client_knows_reinit = False
        self._reinit_untold = False
        self._initial_limit_bytes = initial_limit_bytes
        self._on_state, self._on_resumed, self._on_unverified = on_state, on_resumed, on_unverified
        self._save: Saving | None = None
        self._resuming = Resuming(name, contents, self.observer)
        self._seen: PrecopyInfo | None = None  # by the last scan of the current session
        self._audit: Audit | None = None
        self._in_doubt = False  # in the STOP after a save, from which the client may still go back
        self._save_record: SaveRecord | None = None

    # --- state --------------------------------------------------------------------------------------------

    def set_state(self, target: DeviceState) -> None:
        """Go to `target` along the path of the specification.

        Raises: VfuDevError: an arc failed or does not exist; `state` is the last one reached.
        """
        for step in self.machine.path(self.state, target):
            self.arc(step)

    def arc(self, target: DeviceState) -> None:
        """Go along one arc. On failure the state is the previous one, and a failed stream stays failed.

        Raises: TransitionError: no such arc. StreamError: leaving RESUMING with a state that is not
        verified.
        """
        began_ns = time.perf_counter_ns()
        action = self.machine.action(self.state, target)
        self._conclude(came_back=target in RUNNING_GROUP)
        match action:
            case Action.BEGIN_SAVE:
                self._begin_save(stopped=target is DeviceState.STOP_COPY)
            case Action.STOP_SAVE:
                self._stop_save()
            case Action.END_SAVE if self._all_sent:
                self._go_on()
            case Action.END_SAVE:
                self._end_save("aborted", None, "cancelled")
            case Action.BEGIN_RESUME:
                self._resuming.begin(self.sessions)
            case Action.END_RESUME:
                self._resuming.finish()
                self._on_resumed()
            case Action.NONE:
                pass
        if self.state is not DeviceState.STOP_COPY:
            self.give_up_audit()
        self._enter(target, "requested", time.perf_counter_ns() - began_ns)

    def reset(self, state: DeviceState, reason: str) -> None:
        """Follow a reset or lost connection, after which the migration state is `state`.

        A saving session goes on when the state is still one of the saving group: a reset by the guest during
        PRE_COPY changes registers, not the migration (libvfio-user 4f4fce4). Any other session ends here.

        An audit under way goes on in its small steps, the device running included: a client that is gone
        writes nothing, and a write of the device's own is in the page map, which ends the audit. Only a
        client that has a memory mapped may still write to it unseen.
        """
        if state in RUNNING_GROUP and any(memory.mapped for memory in self.contents.memories):
            self.give_up_audit()
        self._conclude(came_back=False)
        if self._save is not None and state not in SAVING_GROUP:
            self._end_save("aborted", reason, "sent" if self._all_sent else interrupted_result(reason))
        if self._resuming.session is not None and state is not DeviceState.RESUMING:
            self._abandon_resume(reason, interrupted_result(reason))
        if state is not self.state:
            self._enter(state, reason)

    def fail(self, reason: str) -> None:
        """Enter ERROR: the device could not be brought to any good state; only a reset leads out."""
        self._conclude(came_back=False)
        if self._save is not None:
            self._end_save("failed", reason, "failed")
        if self._resuming.session is not None:
            self._abandon_resume(reason, "failed")
        self._enter(DeviceState.ERROR, reason)

    def _enter(self, target: DeviceState, reason: str, took_ns: int = 0) -> None:
        origin, self.state = self.state, target
        # An arc that stops the device does so at its beginning: the last scan is part of the downtime.
        stops = origin in RUNNING_GROUP and target not in RUNNING_GROUP
        ago_ns = took_ns if stops or target is DeviceState.STOP_COPY else 0
        self.observer.state_changed(origin, target, ago_ns)
        if target is DeviceState.STOP_COPY and self._save_record is not None:
            self._save_record.predicted_downtime_seconds = self.observer.predicted_seconds
        self.transitions.append(Transition(time.time() - ago_ns / 1e9, origin, target, reason))
        log_state_change(
            logger, self.name, self.transitions[-1], self._save_record, self._resuming.record, self.observer
        )
        self._on_state(target)

    # --- saving -------------------------------------------------------------------------------------------

    def reinit(self, memory: DeviceMemory, pages: PageIndices) -> None:
        """Note that the device reconfigured itself: the content of `pages` is initial data once more.

        In PRE_COPY they are sent again, even if they were sent already; in other states nothing happens.
        A client that opted in learns of it (VFIO_PRECOPY_INFO_REINIT) and sees initial_bytes rise; for
        another they are among dirty_bytes, because initial_bytes may only fall for it.
        """
        if self._save is None or self.state not in PRE_COPY_GROUP:
            memory.pages.mark_pages(pages)
            return
        index = self.contents.memories.index(memory)
        self._save.reinit(index, pages, as_initial=self.announce_reinit())

    def announce_reinit(self) -> bool:
        """Note a REINIT; returns whether the client learns of it."""
        assert self._save_record is not None
        self._save_record.reinits += 1
        self._reinit_untold = self.client_knows_reinit
        return self.client_knows_reinit

    def take_reinit(self) -> bool:
        """Return whether there was a `reinit` since this was last asked."""
        untold, self._reinit_untold = self._reinit_untold, False
        return untold

    def _begin_save(self, *, stopped: bool) -> None:
        self.give_up_audit()
        self._reinit_untold = False
        # A client does not ask a stopped device for initial_bytes, and without the split there are fewer
        # records.
        limit = None if stopped else self._initial_limit_bytes
        record = SaveRecord()
        self._save = self.sessions.save(self.contents, limit, stopped, record)
        self.observer.save_began(record)
        record.started = time.time()
        record.stopped = record.started if stopped else None
        record.initial_bytes = self._fresh_info().initial_bytes
        record.pass_list = self._save.pass_list
        self._save_record = record

    def _stop_save(self) -> None:
        record = self._save_record
        assert record is not None
        if self._save is None:
            # A read failed in PRE_COPY: what was sent has a hole, so there is nothing to complete.
            raise StateError(f"this migration failed already: {record.error}")
        record.stopped = time.time()
        self._save.stop()

    def _end_save(self, status: str, error: str | None, result: str) -> None:
        record = self._save_record
        assert record is not None
        if self._save is not None:  # a session that failed was counted then
            self.observer.save_ended(result)
        self._save = None
        if record.status == "active" or status == "failed":
            record.status, record.error, record.ended = status, error, time.time()
            record.audited = None

    @property
    def _all_sent(self) -> bool:
        """Whether the save under way was read to its end."""
        return self._save is not None and self._save.ended

    def _go_on(self) -> None:
        """The client goes from STOP_COPY to STOP, and has read everything."""
        assert self._save_record is not None
        self._save = None
        self._in_doubt = True
        if self._save_record.status == "sent":
            self._save_record.status = "completed"
        self.observer.went_on()

    def _conclude(self, *, came_back: bool) -> None:
        """The device leaves the STOP that followed a save: only now its result is known."""
        record = self._save_record
        if not self._in_doubt or record is None:
            return
        self._in_doubt = False
        self.observer.save_ended("cancelled" if came_back else "completed")
        if came_back and record.status == "completed":
            record.status, record.error = "aborted", "the client went back to RUNNING"

    def read_into(self, buffer: memoryview, others: Others = NO_OTHERS) -> int:
        """Serve MIG_DATA_READ: fill `buffer` unless the data ends; returns the bytes stored. See `read`."""
        return self._read(len(buffer), lambda save: (None, save.read_into(buffer, others)))[1]

    def read(self, count: int) -> Vectors:
        """Serve MIG_DATA_READ: return where the next `count` bytes are, or fewer when the data ends.

        Raises: StateError: outside the saving group, or the session ended by what `others` did.
        """
        return self._read(count, lambda save: save.read(count))[0]

    def _read(self, count: int, take: Callable[[Saving], tuple[T, int]]) -> tuple[T, int]:
        save, record = self._save, self._save_record
        if save is None or record is None:
            raise StateError(f"no migration data to read in {self.state.name}")
        began_ns = time.perf_counter_ns()
        initial_before = save.sent_initial_bytes
        try:
            found, stored = take(save)
            if self._save is not save:
                raise StateError("the migration ended while its data was read")
        except Exception as err:
            # A stream with a hole must not be completed by a client that tries again.
            if self._save is save:
                self._end_save("failed", f"{type(err).__name__}: {err}", "failed")
            raise
        record.count_read(stored, stopped=save.stopped)
        initial = save.sent_initial_bytes - initial_before
        self.observer.read(count, stored, began_ns, initial_bytes=None if save.stopped else initial)
        if save.ended and record.status == "active":
            record.status, record.digest, record.ended = "sent", save.digest, time.time()
            self.observer.all_read()
            self._audit = Audit(self.contents, save.block_contents, record)
        return found, stored

    @property
    def has_precopy_info(self) -> bool:
        """Whether `precopy_info` has an answer: in PRE_COPY, unless a read failed there."""
        return self.state in PRE_COPY_GROUP and self._save is not None

    @property
    def precopy_seen(self) -> PrecopyInfo | None:
        """Result of the last `precopy_info`, without a new scan; None if it has no answer."""
        return self._seen if self.has_precopy_info else None

    def precopy_info(self, *, by_client: bool = False) -> PrecopyInfo:
        """Serve MIG_GET_PRECOPY_INFO; each query also shows how far the client is (`forecast`).

        Raises: StateError: outside PRE_COPY and PRE_COPY_P2P.
        """
        if not self.has_precopy_info:
            raise StateError(f"no pre-copy figures in {self.state.name}")
        info = self._fresh_info()
        if by_client:
            self.observer.asked(info.initial_bytes + info.dirty_bytes)
        return info

    def _fresh_info(self) -> PrecopyInfo:
        assert self._save is not None
        self._seen = info = self._save.info()
        self.observer.forecaster.tell(info.initial_bytes + info.dirty_bytes + self._save.tail_bytes)
        return info

    def stop_copy_length(self) -> int:
        """Serve MIG_DATA_SIZE: bytes still to be read if the device stopped now; all of them unless saving.

        It exceeds initial + dirty by the register blocks and the end record alone: some hundred bytes,
        constant. QEMU 10.2 takes that sum as its estimate and this as the exact figure, and would alternate
        for ever between "close" and "far" if only the first were below its threshold (bandwidth x downtime
        limit). The framing that QEMU sends in an idle iteration already keeps the threshold above a tail of
        this size.
        """
        if self._save is not None:
            info = self._fresh_info()
            return info.initial_bytes + info.dirty_bytes + self._save.tail_bytes
        return self.sessions.whole_bytes(self.contents)

    @property
    def audit_pending(self) -> bool:
        """Whether `advance_audit` has something to do that costs no downtime.

        In STOP_COPY the client still has to read the end of the data, and the destination to store the last
        of it: steps of 5 ms in between added 5 to 10 ms to the downtime.
        """
        return self._audit is not None and self.state is not DeviceState.STOP_COPY

    def advance_audit(self, budget_seconds: float) -> None:
        """Compare the data sent with memory, for about `budget_seconds`; see `Audit`."""
        if self._audit is None or not self._audit.advance(budget_seconds):
            return
        record, self._audit = self._audit.record, None
        if record.status == "failed":
            self.observer.totals.audit_failures += 1
            logger.error("%s: %s", self.name, record.error)

    def give_up_audit(self) -> None:
        """Note that memory may change from now on: a running audit is given up."""
        if self._audit is not None:
            self._audit.give_up()
            self._audit = None

    # --- resuming -----------------------------------------------------------------------------------------

    def write(self, data: memoryview) -> None:
        """Serve MIG_DATA_WRITE.

        Raises: StateError: outside RESUMING. StreamError: the stream is refused, now and from now on.
        """
        if self._resuming.session is None:
            raise StateError(f"no migration data is expected in {self.state.name}")
        self._resuming.write(data)

    @property
    def initial_received(self) -> int:
        """Number of times that all initial data of this resume has arrived; above 1 only after a REINIT."""
        session = self._resuming.session
        return 0 if session is None else session.initial_ends

    def break_session(self, error: VfuDevError) -> None:
        """End the session under way as failed: migration data could not be read, or taken.

        What was sent has a hole from then on, so a save cannot be completed and a resume is refused for good.
        """
        if self._save is not None:
            self._end_save("failed", str(error), "failed")
        if self._resuming.session is not None:
            self._resuming.refuse(str(error))

    def _abandon_resume(self, reason: str, result: str) -> None:
        self._resuming.abandon(reason, result)
        self._on_unverified()

    # --- what others see ----------------------------------------------------------------------------------

    def save_status(self) -> dict[str, object] | None:
        """Return the most recent outgoing migration."""
        return None if self._save_record is None else self._save_record.as_dict()

    def saved(self) -> dict[str, int] | None:
        """Return the numbers of the most recent outgoing migration so far that change from read to read."""
        record, names = self._save_record, ("precopy_bytes", "stop_copy_bytes", "passes")
        return None if record is None else {name: getattr(record, name) for name in names}

    def sent(self) -> tuple[int, int]:
        """Return the stream bytes and passes of the most recent outgoing migration so far."""
        record = self._save_record
        return (0, 0) if record is None else (record.precopy_bytes + record.stop_copy_bytes, record.passes)

    def received(self) -> int:
        """Return the stream bytes of the most recent incoming migration so far."""
        record = self._resuming.record
        return 0 if record is None else record.received_bytes

    def resume_status(self) -> dict[str, object] | None:
        """Return the most recent incoming migration."""
        return None if self._resuming.record is None else asdict(self._resuming.record)
