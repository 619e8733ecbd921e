"""Interrupts of all three kinds over the wire: one kind at a time, masks, levels, and each delivered once."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from dmakit import Driver, carry
from pcikit import COMMAND, STATUS, capabilities, read, write
from serverkit import RunningServer, ServerFactory, readable

from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.uapi import (
    VFIO_IRQ_SET_ACTION_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX,
)
from vfu_dev.uapi import VFIO_PCI_INTX_IRQ_INDEX as INTX
from vfu_dev.uapi import VFIO_PCI_MSI_IRQ_INDEX as MSI
from vfu_dev.uapi import VFIO_PCI_MSIX_IRQ_INDEX as MSIX
from vfu_dev.uapi import DeviceState as S

INTERRUPT_PIN, CAP_MSI = 0x3D, 0x05
INTERRUPT_STATUS, INTX_DISABLE = 0x8, 0x400
MESSAGES = [pytest.param(MSI, id="msi"), pytest.param(MSIX, id="msix")]


class Interrupts:
    """A client's eventfds for one kind of interrupts."""

    def __init__(self, device: VfioUserDevice, kind: int, count: int) -> None:
        self.device = device
        self.kind = kind
        self.eventfds = device.enable_irqs(kind, count)

    def heard(self, seconds: float = 0) -> dict[int, int]:
        """Return how often each vector was raised since the last call."""
        return {self.eventfds.index(fd): os.eventfd_read(fd) for fd in readable(self.eventfds, seconds)}

    def mask(self, masked: bool) -> None:
        """Mask or unmask INTx."""
        action = VFIO_IRQ_SET_ACTION_MASK if masked else VFIO_IRQ_SET_ACTION_UNMASK
        self.device.set_irqs(INTX, VFIO_IRQ_SET_DATA_NONE | action, 0, 1)


@contextmanager
def interrupts(server: RunningServer, kind: int) -> Iterator[tuple[Interrupts, Driver]]:
    """Yield a client that has set up all interrupts of a kind, and its driver."""
    with server.connect() as device:
        made = Interrupts(device, kind, 1 if kind == INTX else 4)
        try:
            yield made, Driver(device)
        finally:
            for fd in made.eventfds:
                os.close(fd)


def test_configuration_space_offers_all_three(device: VfioUserDevice) -> None:
    """Interrupt pin A; MSI with four messages, 64-bit addresses and masks, of which the rest is read-only."""
    assert read(device, INTERRUPT_PIN, 1) == 1
    msi = capabilities(device)[CAP_MSI]
    assert read(device, msi + 2) == 2 << 1 | 0x80 | 0x100
    device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, msi + 2, b"\xff" * 22)
    assert read(device, msi + 2) == 2 << 1 | 0x80 | 0x100 | 0x71
    written = device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, msi + 4, 20)
    assert struct.unpack("<QHHII", written) == ((1 << 64) - 4, 0xFFFF, 0, 0xF, 0)
    assert [device.irq_info(kind).count for kind in (INTX, MSI, MSIX)] == [1, 4, 4]


@pytest.mark.parametrize(("asked", "messages"), [(0, 0), (5, 8)])
def test_as_many_messages_of_msi_as_asked_for(serve: ServerFactory, asked: int, messages: int) -> None:
    """Rounded up to a power of two; 0 is no MSI, and the others are there all the same."""
    with serve("--msi-vectors", str(asked)).connect() as device:
        assert [device.irq_info(kind).count for kind in (INTX, MSI, MSIX)] == [1, messages, 4]
        assert (CAP_MSI in capabilities(device)) is (messages > 0)


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_arrives(server: RunningServer, kind: int) -> None:
    with interrupts(server, kind) as (irqs, driver):
        for vector in (2, 0, 3, 1, 1):
            driver["irq_raise"] = vector
        assert irqs.heard() == {0: 1, 1: 2, 2: 1, 3: 1}
        driver["irq_raise"] = 4
        assert irqs.heard() == {}


def test_msi_with_fewer_messages_shares_them(device: VfioUserDevice) -> None:
    irqs, driver = Interrupts(device, MSI, 2), Driver(device)
    for vector in range(4):
        driver["irq_raise"] = vector
    assert irqs.heard() == {0: 2, 1: 2}
    for fd in irqs.eventfds:
        os.close(fd)


def test_one_kind_at_a_time(device: VfioUserDevice) -> None:
    """As with the kernel's devices: the second is refused until the first is disabled."""
    for kind, other in ((INTX, MSI), (MSI, MSIX), (MSIX, INTX)):
        fds = device.enable_irqs(kind, 1)
        with pytest.raises(ClientCommandError) as refused:
            device.enable_irqs(other, 1)
        assert refused.value.errno == errno.EINVAL
        Driver(device)["irq_raise"] = 0
        assert readable(fds, 0) == fds
        device.disable_irqs(kind)
        os.close(fds[0])
        Driver(device)["intx_causes"] = 1


def test_intx_is_asserted_until_the_guest_acknowledges(server: RunningServer) -> None:
    """The client hears of it once, then after each unmask as long as a cause stands."""
    with interrupts(server, INTX) as (irqs, driver):
        driver["irq_raise"] = 1
        driver["irq_raise"] = 3
        assert (irqs.heard(), driver["intx_causes"]) == ({0: 1}, 0b1010)
        assert read(irqs.device, STATUS) & INTERRUPT_STATUS
        irqs.mask(False)
        assert irqs.heard() == {0: 1}
        driver["intx_causes"] = 0b0010
        irqs.mask(False)
        assert (irqs.heard(), driver["intx_causes"]) == ({0: 1}, 0b1000)
        driver["intx_causes"] = 0b1000
        irqs.mask(False)
        assert (irqs.heard(), driver["intx_causes"]) == ({}, 0)
        assert not read(irqs.device, STATUS) & INTERRUPT_STATUS
        driver["irq_raise"] = 0
        assert irqs.heard() == {0: 1}


def test_intx_that_is_masked_or_disabled_is_not_heard_and_not_lost(server: RunningServer) -> None:
    with interrupts(server, INTX) as (irqs, driver):
        irqs.mask(True)
        driver["irq_raise"] = 0
        assert irqs.heard() == {}
        irqs.mask(False)
        assert irqs.heard() == {0: 1}
        driver["intx_causes"] = 1
        irqs.mask(False)
        write(irqs.device, COMMAND, read(irqs.device, COMMAND) | INTX_DISABLE)
        driver["irq_raise"] = 2
        assert irqs.heard() == {}
        assert read(irqs.device, STATUS) & INTERRUPT_STATUS
        write(irqs.device, COMMAND, read(irqs.device, COMMAND) & ~INTX_DISABLE)
        assert irqs.heard() == {0: 1}


def test_intx_that_falls_before_the_client_noticed_is_not_heard(server: RunningServer) -> None:
    with interrupts(server, INTX) as (irqs, driver):
        for _ in range(3):
            driver["irq_raise"] = 0
            driver["intx_causes"] = 1
        driver["irq_raise"] = 0
        irqs.device.reset()
        assert (irqs.heard(), driver["intx_causes"]) == ({}, 0)
        driver["irq_raise"] = 0
        assert irqs.heard() == {0: 1}


def test_unmasking_by_eventfd_is_refused(device: VfioUserDevice) -> None:
    """Nobody would look at it; QEMU then unmasks by message."""
    irqs = Interrupts(device, INTX, 1)
    flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK
    with pytest.raises(ClientCommandError) as refused:
        device.set_irqs(INTX, flags, 0, 1, fds=irqs.eventfds)
    assert refused.value.errno == errno.ENOTSUP
    os.close(irqs.eventfds[0])


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_of_the_last_instant_arrives_once_on_one_side(serve: ServerFactory, kind: int) -> None:
    """What the client has not noticed at the stop is the destination's, with all that was raised after."""
    ways = [[S.STOP], [S.PRE_COPY], [S.PRE_COPY, S.PRE_COPY_P2P]]
    source, target = serve(), serve()  # a new client finds them as they were at first
    for noticed, states in itertools.product((True, False), ways):
        with interrupts(source, kind) as (here, driver), interrupts(target, kind) as (there, _):
            running = [state for state in states if state is S.PRE_COPY]
            for state in running:
                here.device.migration.set_state(state)
            driver["irq_raise"] = 1
            driver["irq_raise"] = 1
            assert not noticed or here.heard() == {1: 2}
            for state in states[len(running) :]:
                here.device.migration.set_state(state)
                if state is S.PRE_COPY_P2P:
                    driver["irq_raise"] = 2
            carry(here.device, there.device)
            expected = {} if noticed else {1: 1}
            if S.PRE_COPY_P2P in states:
                expected[2] = 1
            assert (here.heard(), there.heard()) == ({}, expected), (noticed, states)


def test_intx_moves_with_its_causes(serve: ServerFactory) -> None:
    """The destination's client hears of it, whether or not the source's has, masked it, or disabled it."""
    source, target = serve(), serve()
    for prepare in ("unnoticed", "noticed", "masked", "disabled"):
        with interrupts(source, INTX) as (here, driver), interrupts(target, INTX) as (there, moved):
            if prepare == "masked":
                here.mask(True)
            if prepare == "disabled":
                write(here.device, COMMAND, read(here.device, COMMAND) | INTX_DISABLE)
            driver["irq_raise"] = 2
            if prepare == "noticed":
                assert here.heard() == {0: 1}
            carry(here.device, there.device)
            assert here.heard() == {}
            if prepare == "disabled":
                assert there.heard() == {}
                write(there.device, COMMAND, read(there.device, COMMAND) & ~INTX_DISABLE)
            assert (there.heard(), moved["intx_causes"]) == ({0: 1}, 0b100), prepare
            moved["intx_causes"] = 0b100
            there.mask(False)
            assert there.heard() == {}


@pytest.mark.parametrize("kind", [INTX, MSI, MSIX], ids=["intx", "msi", "msix"])
def test_a_migration_given_up_at_the_last_instant_loses_nothing(server: RunningServer, kind: int) -> None:
    with interrupts(server, kind) as (irqs, driver):
        driver["irq_raise"] = 0
        irqs.device.migration.set_state(S.STOP_COPY)
        assert irqs.heard() == {}
        found = server.status()["interrupts"]
        assert found["kind"] == {INTX: "intx", MSI: "msi", MSIX: "msix"}[kind]
        assert (found["pending"], found["intx_causes"]) == (([], [0]) if kind == INTX else ([0], []))
        irqs.device.migration.set_state(S.RUNNING)
        assert irqs.heard() == {0: 1}


def test_either_the_client_has_it_or_the_device(server: RunningServer) -> None:
    """300 stops, each while another thread of the client is looking: never lost, never twice."""
    with interrupts(server, MSIX) as (irqs, driver):
        eventfd, noticed, done = irqs.eventfds[0], [0], threading.Event()

        def look() -> None:
            poll = select.poll()
            poll.register(eventfd, select.POLLIN)
            while not done.is_set():
                if poll.poll(100):
                    with contextlib.suppress(BlockingIOError):  # the device was faster
                        noticed[0] += os.eventfd_read(eventfd)

        looker = threading.Thread(target=look)
        looker.start()
        try:
            for round_ in range(1, 301):
                driver["irq_raise"] = 0
                irqs.device.migration.set_state(S.STOP)
                irqs.device.migration.set_state(S.RUNNING)
                while noticed[0] < round_:
                    assert looker.is_alive()
                    readable([eventfd], 0.01)
                assert noticed[0] == round_
        finally:
            done.set()
            looker.join()
        assert irqs.heard() == {}


def test_a_line_whose_rise_is_lost_is_seen_in_registers(server: RunningServer) -> None:
    """A guest that polls finds the cause and the interrupt status; the line rises with the next cause."""
    with interrupts(server, INTX) as (irqs, driver):
        with server.control() as control:
            control.command("fault", fault="op=irq,error,count=1")
        driver["irq_raise"] = 1
        assert (irqs.heard(), driver["intx_causes"]) == ({}, 0b10)
        assert read(irqs.device, STATUS) & INTERRUPT_STATUS
        driver["irq_raise"] = 2
        assert (irqs.heard(), driver["intx_causes"]) == ({0: 1}, 0b110)
        driver["intx_causes"] = 0b110
        assert not read(irqs.device, STATUS) & INTERRUPT_STATUS
