"""The incoming migrations of one device: the session under way, and what became of the last one."""

from __future__ import annotations

import logging
import time

from vfu_dev.errors import StreamError
from vfu_dev.migration.observer import Observer
from vfu_dev.migration.records import ResumeRecord
from vfu_dev.migration.schema import MigratableState
from vfu_dev.migration.sessions import Receiving, Sessions

logger = logging.getLogger(__name__)


class Resuming:
    """Counts and records what sessions do, one after the other.

    Args: name: the device, for logs.

    Attributes:
        session: the one under way, None for none.
        record: of the most recent one.
    """

    def __init__(self, name: str, contents: MigratableState, observer: Observer) -> None:
        self.session: Receiving | None = None
        self.record: ResumeRecord | None = None
        self._name = name
        self._contents = contents
        self._observer = observer

    def begin(self, sessions: Sessions) -> None:
        """Begin one, which clears memory."""
        self._observer.totals.resumes_started += 1
        self.record = ResumeRecord(started=time.time())
        self.session = sessions.resume(self._contents)

    def write(self, data: memoryview) -> None:
        """Take a slice of the stream, in a session. Raises: StreamError: now and from now on."""
        session, record = self._under_way()
        try:
            session.write(data)
        except StreamError as err:
            self._refused(record, err)
            raise
        finally:
            self._observer.totals.received_bytes += session.received_bytes - record.received_bytes
            record.received_bytes = session.received_bytes
            record.digest = session.digest

    def finish(self) -> None:
        """Complete the session.

        Raises: StreamError: the stream was not whole, or refused. The session stays, failed: every further
                request gets the same error, until a reset.
        """
        session, record = self._under_way()
        try:
            session.finish()
        except StreamError as err:
            self._refused(record, err)
            raise
        self.session = None
        record.status, record.ended = "completed", time.time()
        self._observer.resume_ended("completed")

    def refuse(self, reason: str) -> None:
        """Refuse the rest of the stream, of which a part was lost."""
        session, record = self._under_way()
        self._refused(record, session.refuse(reason))

    def abandon(self, reason: str, result: str) -> None:
        """End the session without a result; memory holds unverified content.

        Args: result: one of RESUME_RESULTS.
        """
        _, record = self._under_way()
        self.session = None
        if record.status == "active":
            record.status, record.error, record.ended = "aborted", reason, time.time()
            self._observer.resume_ended(result)
        logger.warning("%s: incoming state given up (%s), memory is cleared", self._name, reason)

    def _under_way(self) -> tuple[Receiving, ResumeRecord]:
        assert self.session is not None
        assert self.record is not None
        return self.session, self.record

    def _refused(self, record: ResumeRecord, error: StreamError) -> None:
        if record.status == "active":
            record.status, record.error, record.ended = "failed", str(error), time.time()
            self._observer.resume_ended("refused")
            logger.error("%s: state refused: %s", self._name, error)
