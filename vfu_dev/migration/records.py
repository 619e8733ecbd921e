"""The result of a migration, and the log line of a change of state: text for people, fields for programs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from vfu_dev.migration.fsm import PRE_COPY_GROUP, SAVING_GROUP
from vfu_dev.migration.observer import Observer
from vfu_dev.migration.save import PassRecord, SaveCounters
from vfu_dev.sizes import format_count, format_size
from vfu_dev.uapi import DeviceState

# Of a save that its client did not end itself, by its status: what is left of it here.
ADVICE = {
    "aborted": "the migration is lost; this device's memory is whole, and the next client gets it",
    "sent": "a destination may be running this state: use only one of the two",
}


@dataclass
class Transition:
    """One change of state; `time` in unix seconds."""

    time: float
    origin: DeviceState
    target: DeviceState
    reason: str

    def as_dict(self) -> dict[str, object]:
        """Return it as the control socket shows it."""
        return {
            "time": self.time,
            "from": self.origin.name,
            "to": self.target.name,
            "reason": self.reason,
        }


@dataclass
class SaveRecord(SaveCounters):
    """The most recent outgoing migration and its result; times in unix seconds, bytes of the stream.

    Attributes:
        audited: whether memory was compared with what was sent. False: not yet. None: it never will be,
            because not all was read or memory may have changed before the comparison ended.
        status: active until all was read, then sent; completed once the client went on from STOP_COPY to
            STOP. What is left of these when it leaves is final. aborted: it went back to RUNNING, from STOP
            too, or left before all was read. failed: an error here, or the audit's.
    """

    status: str = "active"
    error: str | None = None
    initial_bytes: int = 0
    precopy_bytes: int = 0
    stop_copy_bytes: int = 0
    reinits: int = 0  # number of times that the device had new initial data
    digest: str | None = None
    audited: bool | None = False
    started: float = 0.0
    stopped: float | None = None
    ended: float | None = None
    predicted_downtime_seconds: float | None = None  # when the device stopped
    pass_list: list[PassRecord] = field(default_factory=list)  # the session's own, the most recent passes

    def count_read(self, stored: int, *, stopped: bool) -> None:
        """Count the bytes of a read."""
        if stopped:
            self.stop_copy_bytes += stored
        else:
            self.precopy_bytes += stored

    def as_dict(self) -> dict[str, object]:
        """Return it as the control socket shows it; `asdict` takes 20 times as long for 200 passes."""
        first = {"status": self.status, "error": self.error}  # first, for people
        return {**first, **vars(self), "pass_list": [dict(vars(one)) for one in self.pass_list]}


@dataclass
class ResumeRecord:
    """The most recent incoming migration and its result."""

    status: str = "active"  # active, completed, failed, aborted
    error: str | None = None
    received_bytes: int = 0
    digest: str | None = None
    started: float = 0.0
    ended: float | None = None


def log_state_change(
    logger: logging.Logger,
    device: str,
    change: Transition,
    save: SaveRecord | None,
    resume: ResumeRecord | None,
    observer: Observer,
) -> None:
    """Log one line with why the state changed and the figures that matter then."""
    origin, target, level = change.origin, change.target, logging.INFO
    text = "" if change.reason == "requested" else f" ({change.reason})"
    fields: dict[str, object] = {
        "event": "state",
        "device": device,
        "from": origin.name,
        "to": target.name,
        "reason": change.reason,
    }
    if save is not None and target in PRE_COPY_GROUP and origin not in SAVING_GROUP:
        text += f": initial {format_size(save.initial_bytes)}"
        fields["initial_bytes"] = save.initial_bytes
    elif save is not None and origin in SAVING_GROUP and target is not DeviceState.PRE_COPY:
        text += (
            f": pre-copy {format_size(save.precopy_bytes)}, stop-copy {format_size(save.stop_copy_bytes)},"
            f" {format_count(save.passes, 'pass')},"
            f" {save.pages_sent} pages ({save.pages_resent} again), {save.status}"
        )
        fields |= {
            "save_status": save.status,
            "precopy_bytes": save.precopy_bytes,
            "stop_copy_bytes": save.stop_copy_bytes,
            "passes": save.passes,
            "pages_sent": save.pages_sent,
            "pages_resent": save.pages_resent,
            "zero_pages": save.zero_pages,
        }
        predicted = observer.predicted_seconds
        if target not in PRE_COPY_GROUP and predicted is not None:
            fields["predicted_downtime_seconds"] = round(predicted, 6)
            text += f", predicted downtime {predicted * 1000:.0f} ms"
            if origin is DeviceState.STOP_COPY and save.status == "completed":
                measured = observer.last_downtime_seconds
                assert measured is not None
                fields["downtime_seconds"] = round(measured, 6)
                text += f", measured downtime {measured * 1000:.0f} ms"
        if target not in SAVING_GROUP and change.reason != "requested" and save.status in ADVICE:
            level, text = logging.WARNING, f"{text}; {ADVICE[save.status]}"
    if resume is not None and origin is DeviceState.RESUMING:
        text += f": {format_size(resume.received_bytes)} received, {resume.status}"
        fields |= {"resume_status": resume.status, "received_bytes": resume.received_bytes}
    logger.log(level, "%s: %s -> %s%s", device, origin.name, target.name, text, extra={"fields": fields})
