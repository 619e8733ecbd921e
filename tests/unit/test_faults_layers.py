"""Faults as layers: what they do not change goes to the next one, and they stack in the order of arming."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest

from vfu_dev.device import Device, Field, Registers
from vfu_dev.device.bus import Bus, NoBus
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.errors import AccessError, ConfigError
from vfu_dev.faults import OPERATIONS, Fault, FaultBoard, Seam
from vfu_dev.faults.board import MAX_ARMED
from vfu_dev.faults.layers import LAYERS
from vfu_dev.libvfio_user import DeviceCallbacks
from vfu_dev.testing import InMemoryBus, InMemoryClient
from vfu_dev.uapi import VFIO_PCI_INTX_IRQ_INDEX


class Recorder:
    """Has every method, and notes each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            self.calls.append((name, args, kwargs))
            return name

        return call


def methods(protocol: type) -> dict[str, inspect.Signature]:
    """Return the methods of a Protocol and of those that it extends."""
    return {
        name: inspect.signature(member)
        for one in protocol.__mro__
        if one not in (Protocol, object)
        for name, member in vars(one).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if not name.startswith("region")])
def test_a_layer_passes_on_what_it_does_not_change(operation: str) -> None:
    """Every method of its Protocol that it does not have itself, and what it has takes the same arguments."""
    layer: Any = LAYERS[operation]
    around = Bus if operation in ("irq", "dma-read", "dma-write") else DeviceCallbacks
    own = {name for name in methods(around) if name in vars(layer)}
    assert own
    for name, signature in methods(around).items():
        recorder = Recorder()
        if name in own:
            found = inspect.signature(getattr(layer, name)).parameters
            assert list(found) == list(signature.parameters)
        else:
            assert getattr(layer(None, None, recorder), name)(1, write=2) == name
            assert recorder.calls == [(name, (1,), {"write": 2})]


def test_every_operation_has_a_layer() -> None:
    assert set(LAYERS) == set(OPERATIONS)


class Host:
    """What faults may do here: write past the log."""

    def __init__(self) -> None:
        self.unlogged: list[tuple[int, bytes]] = []

    def hold(self, seconds: float | None, over: Callable[[], bool]) -> None:
        """Fail."""
        raise AssertionError

    def disconnect(self) -> None:
        """Fail."""
        raise AssertionError

    def fail_device(self, reason: str) -> None:
        """Fail."""
        raise AssertionError

    def write_unlogged(self, address: int, data: memoryview | bytes) -> None:
        """Note it."""
        self.unlogged.append((address, bytes(data)))


class Faulty:
    """A client of a device, with faults around its bus."""

    def __init__(self, device: Device) -> None:
        self.client = InMemoryClient(device)
        self.bus = self.client.bus
        self.host = Host()
        seam = Seam[Bus](("irq", "dma-read", "dma-write"), self.bus, device.attach)
        self.board = FaultBoard(device, self.host, [seam])

    def arm(self, text: str) -> int:
        """Arm a fault."""
        return self.board.arm(Fault.parse(text))


class Bell(Device):
    """Has INTx, and two causes for it."""

    registers = Registers(0, [Field("causes", 0x4, "<u4", "intx", "who rang")])
    msi_vectors = 2


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    made = Faulty(ReferenceDevice("d", memory_bytes=1 << 20))
    with made.client:
        yield made


def test_nothing_stands_around_a_device_without_faults(faulty: Faulty) -> None:
    """The bus itself is back in its place as soon as the last fault is cleared."""
    device, board = faulty.client.device, faulty.board
    assert device.bus is faulty.bus
    first = faulty.arm("op=irq,error,count=1")
    second = faulty.arm("op=irq,error,after=1")
    for vector in (1, 2):
        assert device.bus.raise_message(vector)  # as far as the device knows
    assert faulty.client.irqs == []
    board.clear(second)
    device.bus.raise_message(3)
    assert faulty.client.irqs == [3]
    assert board.injected["irq"] == 2
    board.clear(first)
    assert device.bus is faulty.bus
    with pytest.raises(ConfigError, match="not with this libvfio-user"):
        faulty.arm("op=mig-read,error")


def test_a_write_past_the_log_is_innermost(faulty: Faulty) -> None:
    """Whatever else is armed for the same write happens too, and is not undone by it."""
    memory = faulty.client.dma_map(0, 4096).memory
    device = faulty.client.device
    for order in (("corrupt=1", "unlogged,count=1"), ("unlogged,count=1", "corrupt=1")):
        for action in order:
            faulty.arm(f"op=dma-write,{action}")
        faulty.host.unlogged.clear()
        device.guest_memory.write(8, bytes(4))
        assert faulty.host.unlogged == [(8, b"\0\1\0\0")]
        assert not any(memory)
        device.guest_memory.write(8, bytes(4))
        assert faulty.host.unlogged == [(8, b"\0\1\0\0")]
        assert bytes(memory[8:12]) == b"\0\1\0\0"
        memory[:] = bytes(len(memory))
        assert faulty.board.clear() == 2
    assert device.bus is faulty.bus


def test_armed_faults_are_limited(faulty: Faulty) -> None:
    """One more than there may be is refused; one less makes room."""
    armed = [faulty.arm("op=dma-write,error=EIO,after=1000000") for _ in range(MAX_ARMED)]
    with pytest.raises(ConfigError, match=f"{MAX_ARMED} are armed, which is the limit"):
        faulty.arm("op=dma-write,error=EIO")
    faulty.board.clear(armed[0])
    faulty.arm("op=dma-write,error=EIO")
    assert len(faulty.board.armed) == MAX_ARMED


def test_reading_and_writing_are_two_operations(faulty: Faulty) -> None:
    """A fault of one leaves the other alone, and asking whether memory is there is neither."""
    memory = faulty.client.dma_map(0, 4096).memory
    guest = faulty.client.device
    fault = faulty.arm("op=dma-write,error=EFAULT")
    out = bytearray(4)
    guest.guest_memory.read(0, memoryview(out))
    guest.guest_memory.check(0, 4096, write=True)
    with pytest.raises(AccessError, match="injected"):
        guest.guest_memory.write(0, b"x")
    faulty.board.clear(fault)
    faulty.arm("op=dma-read,corrupt=0")
    guest.guest_memory.write(0, b"x")
    guest.guest_memory.read(0, memoryview(out))
    assert (memory[0], out[0]) == (ord("x"), ord("x") ^ 1)


def test_a_line_that_does_not_rise_rises_with_the_next_cause() -> None:
    """The first INTx is lost, but its cause is in the register; the second arrives."""

    faulty = Faulty(Bell())
    with faulty.client as client:
        faulty.bus.kind = VFIO_PCI_INTX_IRQ_INDEX
        faulty.arm("op=irq,error,count=1")
        for vector, line in ((0, False), (1, True)):
            client.device.raise_irq(vector)
            assert faulty.bus.line is line
        assert client.region_read(0, 4, 4) == b"\3\0\0\0"
        client.region_write(0, 4, b"\3\0\0\0")
        assert faulty.bus.line is False
        client.device.raise_irq(0)
        assert faulty.bus.line is True
        assert faulty.board.injected["irq"] == 1


def test_a_line_that_is_up_is_not_lost_because_another_fault_is_armed() -> None:
    """It does not rise once more, whatever comes and goes around the bus."""

    faulty = Faulty(Bell())
    with faulty.client as client:
        faulty.bus.kind = VFIO_PCI_INTX_IRQ_INDEX
        faulty.arm("op=irq,error,after=1")
        client.device.raise_irq(0)
        other = faulty.arm("op=dma-read,error")
        client.device.raise_irq(1)
        assert faulty.bus.line is True
        faulty.board.clear(other)
        client.device.interrupts.update_line()
        assert faulty.bus.line is True
        assert faulty.board.injected["irq"] == 0


def test_a_line_that_is_up_when_a_fault_is_armed_has_risen() -> None:
    """The next cause leaves the line as it is, so there is no interrupt to lose; the next rise is one."""

    faulty = Faulty(Bell())
    with faulty.client as client:
        faulty.bus.kind = VFIO_PCI_INTX_IRQ_INDEX
        client.device.raise_irq(0)
        faulty.arm("op=irq,error")
        client.device.raise_irq(1)
        assert (faulty.bus.line, faulty.board.injected["irq"]) == (True, 0)
        client.region_write(0, 4, b"\3\0\0\0")
        client.device.raise_irq(0)
        assert (faulty.bus.line, faulty.board.injected["irq"]) == (False, 1)


def test_a_message_that_is_lost_is_none_the_device_could_take_back(faulty: Faulty) -> None:
    """It was raised, as far as the device knows: no error is counted, and it is not pending afterwards."""
    device = faulty.client.device
    faulty.arm("op=irq,error,count=1")
    device.raise_irq(1)
    device.raise_irq(2)
    assert faulty.client.irqs == [2]
    assert (device.counters.irqs, device.counters.irq_errors) == (2, 0)


def test_a_device_that_is_detached_has_nothing_around_it() -> None:
    """No memory, no master, and its interrupts are errors that are counted."""
    device = ReferenceDevice("d", memory_bytes=1 << 20)
    bus = InMemoryBus()
    device.attach(bus)
    assert device.bus_master()
    device.detach()
    assert isinstance(device.bus, NoBus)
    assert not device.bus_master()
    with pytest.raises(AccessError, match="no guest memory"):
        device.guest_memory.read(0, memoryview(bytearray(1)))
    device.raise_irq(0)
    assert (bus.irqs, device.counters.irq_errors) == ([], 1)
    device.close()
