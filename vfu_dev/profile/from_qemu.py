"""What QEMU's trace events tell of devices: which call a gap between two of them contains.

The migration thread traces what it does in order: sizes, a read, what is left. `vfio_save_block` comes when
the data is read and also sent, so a read took at most the time since the event before it. A change of state
has an event before and one behind it, and its time is measured; before QEMU 9.1 there was only the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vfu_dev.errors import shown
from vfu_dev.profile.history import PRE_COPY, SIZE_OF_SILENCE, Announced, History
from vfu_dev.profile.session import Duration, Marks
from vfu_dev.qemu_events import INITIAL_DATA_SENT, Kind
from vfu_dev.qemu_trace import Traced, TraceError
from vfu_dev.uapi import DeviceState, MigrationFlags

# More than a machine has slots for; what has more names is no trace of QEMU.
MAX_DEVICES = 256

# Of the migration thread, one after the other, whichever device they are of.
_IN_ORDER = (
    Kind.SETUP,
    Kind.ITERATE_START,
    Kind.ITERATE,
    Kind.EMPTY,
    Kind.BLOCK,
    Kind.COMPLETE_START,
    Kind.COMPLETE,
    Kind.CONFIG_SAVED,
)
# Between these and a block there is the read and its sending alone; elsewhere RAM may be sent too.
_JUST_BEFORE = (Kind.SECTION, Kind.ITERATE_START, Kind.COMPLETE_START, Kind.STATE, Kind.DEVICE_STATE)
# What a device that is the source has, and what one that is the destination has.
_SENDING = (Kind.ITERATE_START, Kind.ITERATE, Kind.EMPTY, Kind.BLOCK, Kind.COMPLETE_START, Kind.COMPLETE)
_RECEIVING = (Kind.LOAD_RECORD, Kind.LOAD, Kind.BUFFER_LOAD_START, Kind.BUFFER_LOAD_END, Kind.LOAD_CONFIG)
# Threads may write their events in another order than that of their times, by less than this.
_DISORDER_SECONDS = 0.1
_UNKNOWN = Duration(None)


@dataclass
class _Device:
    """A device in the trace, and what the next event's meaning depends on."""

    history: History
    asked: tuple[DeviceState, float | None] | None = None
    last_at: float | None = None  # of any event
    last_kind: Kind | None = None
    record_at: float | None = None
    loading_at: dict[int, float | None] = field(default_factory=dict)
    length: int | None = None  # asked since the last sizes
    asks_length: bool = False  # 11.1 has an event for each query
    asks_sizes: bool = False

    def forget_times(self) -> None:
        """No time of before says how long something takes that is not over."""
        self.last_at = self.record_at = None
        self.loading_at.clear()
        if self.asked is not None:
            self.asked = (self.asked[0], None)


class QemuReader:
    """Follows the devices of one trace, which may have several processes.

    Args: only, marks: see `History`; the marks of each device, in the order of `devices`.
    """

    def __init__(self, only: int | None = None, marks: Sequence[Sequence[Marks]] = ()) -> None:
        self._only, self._marks = only, marks
        self._devices: dict[tuple[int, str], _Device] = {}
        # process -> the last event of its migration thread, and when
        self._order: dict[int, tuple[float | None, Kind]] = {}
        # process -> the time of its last event
        self._clocks: dict[int, float] = {}
        self.ranges = 0
        self.timed: bool | None = None

    @property
    def devices(self) -> dict[tuple[int, str], History]:
        """(process, name) -> its history, in the order in which they appear."""
        return {key: device.history for key, device in self._devices.items()}

    def tell(self, event: Traced) -> None:
        """Take an event. Raises: TraceError: it cannot be."""
        if event.kind is Kind.DMA_LOGGING:
            self.ranges = max(self.ranges, event.numbers["ranges"])
            return
        self._follow_clock(event)
        if event.kind is Kind.SECTION:
            if event.process in self._order or len(self._order) < MAX_DEVICES:
                self._order[event.process] = (event.time, event.kind)
            return
        self.timed = (self.timed is not False) and event.time is not None
        key = (event.process, event.device)
        device = self._devices.get(key)
        if device is None:
            if len(self._devices) >= MAX_DEVICES:
                raise TraceError(event.place, f"more than {MAX_DEVICES} devices")
            number = len(self._devices)
            marks = self._marks[number] if number < len(self._marks) else ()
            device = self._devices[key] = _Device(History(self._only, marks))
        self._take(device, event)
        device.last_at, device.last_kind = event.time, event.kind
        if event.kind in _IN_ORDER:
            self._order[event.process] = (event.time, event.kind)

    def _follow_clock(self, event: Traced) -> None:
        """Notice where the clock was set back, which a log's may be."""
        before = self._clocks.get(event.process)
        if event.time is None or (before is None and len(self._clocks) >= MAX_DEVICES):
            return
        self._clocks[event.process] = event.time
        if before is None or before - event.time < _DISORDER_SECONDS:
            return
        self._order.pop(event.process, None)
        for (process, _), device in self._devices.items():
            if process == event.process:
                device.forget_times()
                device.history.set_clock_back(f"{event.place}: {before - event.time:.6g} s")

    def _take(self, device: _Device, event: Traced) -> None:
        history, at, numbers = device.history, event.time, event.numbers
        if (history.is_receiving and event.kind in _SENDING) or (
            history.is_sending and event.kind in _RECEIVING
        ):
            raise TraceError(
                event.place,
                f"{shown(event.device)} sends and receives at once: two QEMUs wrote this; take it apart",
            )
        match event.kind:
            case Kind.REALIZE:
                history.start()  # a new QEMU has a new device
            case Kind.STATE:
                target = _state(event)
                _asked(device, target, at)
                device.asked = (target, at)
            case Kind.DEVICE_STATE:
                self._reached(device, _state(event), at)
            case Kind.FEATURES:
                announced = MigrationFlags(numbers["flags"] & sum(MigrationFlags))
                history.announced = Announced(announced, numbers["reinit"] != 0, numbers["dma_logging"] != 0)
            case Kind.SETUP:
                history.set_up(at, numbers["data_size"])
            case Kind.STOP_COPY_SIZE:
                device.asks_length = True
                _says_size(history, numbers["ret"] == 0, measured=True)
                device.length = numbers["stop_copy"] if numbers["ret"] == 0 else None
                history.length_asked()
                if history.state not in PRE_COPY:
                    history.length_before(device.length)
                    device.length = None
            case Kind.PRECOPY_INFO:
                device.asks_sizes = True
                if numbers["ret"] == 0:
                    reinit = numbers["reinit"] != 0
                    history.sizes(at, numbers["initial"], numbers["dirty"], reinit=reinit)
            case Kind.PENDING_ESTIMATE if not device.asks_sizes and history.no_sizes:
                # The first estimate is what the device said just before SETUP.
                history.sizes(history.set_up_at, numbers["initial"], numbers["dirty"])
            case Kind.PENDING_EXACT:
                self._exact(device, at, numbers)
            case Kind.REINIT:
                history.sizes(at, numbers["initial"], numbers["dirty"], reinit=True)
            case Kind.BLOCK:
                history.read(at, numbers["data_size"], self._since(device, event))
            case Kind.EMPTY:
                history.empty(at)
            case Kind.COMPLETE:
                history.read_out(at, numbers["ret"] == 0)
            case Kind.SAVE_THREAD_END:
                history.unread()
                history.read_out(at, numbers["ret"] == 1)  # a bool: true is success
            case Kind.CLEANUP:
                history.end_outgoing()
            case Kind.LOAD_RECORD:
                device.record_at = at
                if numbers["flag"] == INITIAL_DATA_SENT:
                    history.initial_written()
            case Kind.LOAD if numbers["ret"] >= 0:
                history.write(numbers["data_size"], _between(device.record_at, at))
            case Kind.BUFFER_LOAD_START:
                device.loading_at = {numbers["index"]: at}
            case Kind.BUFFER_LOAD_END:
                history.write(None, _between(device.loading_at.pop(numbers["index"], None), at))
            case Kind.LOAD_CONFIG:
                history.arrived()
            case Kind.LOAD_CLEANUP:
                history.end_incoming()

    def _reached(self, device: _Device, state: DeviceState, at: float | None) -> None:
        if device.asked is None:
            _asked(device, state, device.last_at)
            took = _between(device.last_at, at)
        elif device.asked[0] is not state:
            # The way back from a change that failed.
            took = _UNKNOWN
        else:
            took = _between(device.asked[1], at, exact=True)
        device.asked = None
        device.history.reached(state, at, took)

    def _exact(self, device: _Device, at: float | None, numbers: dict[str, int]) -> None:
        history, left = device.history, numbers["initial"] + numbers["dirty"]
        if not device.asks_sizes and history.state in PRE_COPY:
            history.sizes(at, numbers["initial"], numbers["dirty"])
        if device.asks_length:
            # Only what was asked for this time: the event itself may show an earlier answer.
            if device.length is not None:
                history.length(at, device.length, left)
            device.length = None
            return
        length = numbers["stop_copy"]
        _says_size(history, length != SIZE_OF_SILENCE, measured=length != SIZE_OF_SILENCE)
        if length != SIZE_OF_SILENCE:
            history.length(at, length, left)

    def _since(self, device: _Device, event: Traced) -> Duration:
        """Return how long at most a read took that is over."""
        order_at, order_kind = self._order.get(event.process, (None, None))
        begin, kind = device.last_at, device.last_kind
        if order_at is not None and (begin is None or order_at >= begin):
            begin, kind = order_at, order_kind
        return _between(begin, event.time, alone=kind in _JUST_BEFORE)


def _asked(device: _Device, target: DeviceState, at: float | None) -> None:
    """QEMU asks for a state."""
    if target in (DeviceState.PRE_COPY, DeviceState.RESUMING):
        # It does so in RUNNING alone, and begins a migration. What the log has before may be another QEMU's.
        device.forget_times()
        device.history.start()
    device.history.asked(target, at)


def _says_size(history: History, says: bool, *, measured: bool) -> None:
    """Note whether MIG_DATA_SIZE says something; a size of 100 GiB may be QEMU's own."""
    if history.says_size is None or says:
        history.says_size = says
        history.says_size_measured = measured


def _between(begin: float | None, end: float | None, *, exact: bool = False, alone: bool = False) -> Duration:
    """Return the time between two events, in the microseconds that a log has."""
    if begin is None or end is None or end < begin:
        return _UNKNOWN
    return Duration(round(end - begin, 6), exact, alone)


def _state(event: Traced) -> DeviceState:
    name = event.words["state"]
    if name not in DeviceState.__members__:
        raise TraceError(
            event.place, f"state {shown(name)}: expected one of {', '.join(DeviceState.__members__)}"
        )
    return DeviceState[name]
