"""What of a stream is made and not read yet: one record.

Nothing is copied that can be sent from where it lies. Of a trapped memory that is device memory itself: a
page is hashed in the moment in which it is handed out, and what was not handed out yet may still change. Of a
mapped memory it is a copy in the reply's buffer, which the guest cannot reach.
"""

from __future__ import annotations

from vfu_dev.memory.kernels import Vectors
from vfu_dev.memory.sending import Record, Reply, plain_record, send


class Outgoing:
    """The record that is read next.

    Attributes:
        left_bytes: what of it was not read yet.
        taken_bytes: what this read has so far.
    """

    def __init__(self) -> None:
        self._bytes = plain_record()
        self._record = self._bytes
        self._reply = Reply()
        self.left_bytes = 0
        self.taken_bytes = 0

    def put(self, data: bytes) -> None:
        """Have `data` read next; all before was read."""
        self._bytes.begin_bytes(data)
        self.put_pages(self._bytes, len(data))

    def put_pages(self, record: Record, size_bytes: int) -> None:
        """Have `record` read next, which has begun; all before was read."""
        self._record = record
        self._reply.alive.append(record.covered)
        self.left_bytes = size_bytes

    def begin_read(self) -> None:
        """Note that what was read before is of no use any more."""
        self.taken_bytes = 0
        self._reply.begin()
        self._reply.alive.append(self._record.covered)

    @property
    def taken(self) -> Vectors:
        """What this read has so far, in order."""
        return self._reply.vectors

    def take(self, room: int) -> int:
        """Take the next bytes, `room` unless the record has fewer; return how many. There has to be one."""
        count = send(self._record, self._reply, room)
        if not count:
            self._reply.grow(room)
            count = send(self._record, self._reply, room)
        self.taken_bytes += count
        self.left_bytes -= count
        return count

    def fill(self, address: int, room: int, fd: int = -1) -> int:
        """Copy the next bytes to `address`, at least one; return how many. There has to be one.

        Somebody else may write there: nothing is read back.

        Args: fd: where something to be read ends it early; -1: nowhere.
        """
        count = send(self._record, self._reply, room, address, fd)
        self.left_bytes -= count
        return count
