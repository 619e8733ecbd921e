"""What `vfu-dev profile record` wrote: each call with its begin and end, so every time is measured.

native/vfio-preload/calls.c has the form of a line.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from vfu_dev.errors import shown
from vfu_dev.profile.history import PRE_COPY, Announced, History
from vfu_dev.profile.session import Duration, Marks
from vfu_dev.profile.tally import Tally
from vfu_dev.qemu_trace import TraceError
from vfu_dev.uapi import VFIO_PRECOPY_INFO_REINIT, DeviceState, MigrationFlags

MAGIC = b"vfu-dev calls "
_VERSION = b"1"
_MAX_LINE_BYTES = 512
_MAX_DEVICES = 256
# CALL -> how many numbers were asked, and how many were answered where it succeeded.
_SHAPES = {
    "flags": (0, 1),
    "set-state": (1, 0),
    "get-state": (0, 1),
    "data-size": (0, 1),
    "precopy-info": (0, 3),
    "precopy-info-v2": (0, 0),
    "log-start": (1, 0),
    "log-stop": (0, 0),
    "log-report": (1, 0),
    "reset": (0, 0),
    "read": (1, 0),
    "write": (1, 0),
}


class Call:
    """One line.

    Attributes:
        place: FILE:LINE.
        begin, end: seconds.
        device: its number, from 0.
        asked, answered: its numbers; `answered` is empty where the call failed.
        result: what it returned, -errno where it failed.
    """

    def __init__(self, place: str, line: str) -> None:
        self.place = place
        before, equals, behind = line.partition(" = ")
        head, answer = before.split(), behind.split()
        if not equals or len(head) < 5 or not answer or head[4] not in _SHAPES:
            raise TraceError(place, f"{shown(line)}: no call of this version of vfu-dev")
        self.name = head[4]
        self.begin = self._number("BEGIN", head[0]) / 1e9
        self.end = self._number("END", head[1]) / 1e9
        self.device = self._number("DEVICE", head[3])
        self.result = self._number("RESULT", answer[0])
        self.asked = [self._number("ASKED", text) for text in head[5:]]
        self.answered = [self._number("ANSWERED", text) for text in answer[1:]]
        asked, answered = _SHAPES[self.name]
        if len(self.asked) != asked or len(self.answered) != (answered if self.result >= 0 else 0):
            raise TraceError(place, f"{self.name}: {shown(line)}: not as many numbers as it has")
        if not 0 <= self.device < _MAX_DEVICES:
            raise TraceError(place, f"DEVICE {self.device}: more than {_MAX_DEVICES} devices")

    def _number(self, name: str, text: str) -> int:
        digits = text.removeprefix("-")
        if not digits.isascii() or not digits.isdecimal() or len(digits) > 20:
            raise TraceError(self.place, f"{name} {shown(text)}: expected a number of at most 64 bits")
        return int(text)

    @property
    def took(self) -> Duration:
        """How long it took."""
        return Duration(max(0.0, round(self.end - self.begin, 9)), exact=True)


def read_calls(file: BinaryIO, name: str) -> Iterator[Call | TraceError]:
    """Yield the calls of a file, and what is wrong with it. A last line that is cut off is left out."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        place = f"{name}:{number}"
        if line.startswith(MAGIC):
            if line.split() != [*MAGIC.split(), _VERSION]:
                yield TraceError(place, "calls of another version of vfu-dev; version 1 can be read")
                return
            continue
        if not line.endswith(b"\n"):
            if len(line) == _MAX_LINE_BYTES:
                yield TraceError(place, "a line that is too long for a call")
            return
        try:
            yield Call(place, line.decode("ascii", "replace").rstrip("\n"))
        except TraceError as error:
            yield error


class CallReader:
    """Follows the devices of one file of calls. See `QemuReader`."""

    def __init__(self, only: int | None = None, marks: Sequence[Sequence[Marks]] = ()) -> None:
        self._only, self._marks = only, marks
        self._histories: dict[int, History] = {}
        self._lengths: dict[int, tuple[float, int]] = {}
        self._with_reinit: set[int] = set()  # devices that accepted MIG_PRECOPY_INFOv2
        self.ranges = 0
        self.refused: int | None = None
        self.start_times, self.report_times = Tally(whole=False), Tally(whole=False)
        self.timed: bool | None = True

    @property
    def devices(self) -> dict[tuple[int, str], History]:
        """(0, number) -> its history."""
        return {(0, str(number)): history for number, history in self._histories.items()}

    def tell(self, call: Call) -> None:
        """Take a call. Raises: TraceError: it cannot be."""
        history = self._histories.get(call.device)
        if history is None:
            number = len(self._histories)
            marks = self._marks[number] if number < len(self._marks) else ()
            history = self._histories[call.device] = History(self._only, marks)
        take: Callable[[History, Call], None] | None = getattr(self, f"_{call.name.replace('-', '_')}", None)
        if take is not None:
            take(history, call)

    def _flags(self, history: History, call: Call) -> None:
        if call.result == 0:
            flags = MigrationFlags(call.answered[0] & sum(MigrationFlags))
            history.announced = Announced(flags, call.device in self._with_reinit, dma_logging=None)

    def _precopy_info_v2(self, history: History, call: Call) -> None:
        # A client may ask for the flags before and after this, and more than once.
        if call.result == 0:
            self._with_reinit.add(call.device)
        if (known := history.announced) is not None:
            history.announced = Announced(known.flags, call.device in self._with_reinit, known.dma_logging)

    def _set_state(self, history: History, call: Call) -> None:
        if call.asked[0] not in list(DeviceState):
            raise TraceError(call.place, f"set-state {call.asked[0]}: there is no such state")
        target = DeviceState(call.asked[0])
        if target is not DeviceState.STOP_COPY and history.state is DeviceState.STOP_COPY:
            # The last read found the end; the client does not say so.
            history.read_out(history.last_read_at, history.found_end)
        if target is not DeviceState.RESUMING and history.state is DeviceState.RESUMING:
            history.arrived()
        history.asked(target, call.begin)
        if call.result == 0:
            history.reached(target, call.end, call.took)
            if target in (DeviceState.STOP, DeviceState.RUNNING):
                history.end_outgoing()
            if target in (DeviceState.RUNNING, DeviceState.RUNNING_P2P):
                history.end_incoming()

    def _reset(self, history: History, call: Call) -> None:
        history.start()

    def _data_size(self, history: History, call: Call) -> None:
        history.says_size, history.says_size_measured = call.result == 0, True
        if call.result != 0:
            return
        if history.state in PRE_COPY:
            self._lengths[call.device] = (call.end, call.answered[0])
            history.length_asked()
        else:
            history.length_before(call.answered[0])

    def _precopy_info(self, history: History, call: Call) -> None:
        if call.result != 0:
            return
        initial, dirty, flags = call.answered
        reinit = bool(flags & VFIO_PRECOPY_INFO_REINIT)
        history.sizes(call.end, initial, dirty, reinit=reinit, asked_at=call.begin)
        # A client that decides asks for both, one right after the other.
        if (length := self._lengths.pop(call.device, None)) is not None:
            history.length(length[0], length[1], initial + dirty)

    def _read(self, history: History, call: Call) -> None:
        history.buffer_bytes = max(history.buffer_bytes, call.asked[0])
        if call.result > 0:
            history.read(call.end, call.result, call.took)
        elif call.result == -errno.ENOMSG:
            history.empty(call.end)
        history.last_read_at, history.found_end = call.end, call.result == 0

    def _write(self, history: History, call: Call) -> None:
        if call.result > 0:
            history.write(call.result, call.took)

    def _log_start(self, history: History, call: Call) -> None:
        if call.result == 0:
            self.ranges = max(self.ranges, call.asked[0])
            self.start_times.add(call.took.seconds or 0.0)
        else:
            self.refused = min(self.refused or call.asked[0], call.asked[0])

    def _log_report(self, history: History, call: Call) -> None:
        if call.result == 0:
            self.report_times.add(call.took.seconds or 0.0)
