"""Interrupts: eventfds that the server signals, in batches of what it takes with one message."""

from __future__ import annotations

import os
import re
import select
import struct
from collections.abc import Callable

import pytest
from inside import Served, inside
from vfio import (
    DATA_BOOL,
    DATA_EVENTFD,
    DATA_NONE,
    DEVICE_SET_IRQS,
    ERR_IRQ,
    INTX,
    MASK,
    MSI,
    MSIX,
    PATHS,
    REQ_IRQ,
    TRIGGER,
    UNMASK,
    Attached,
    Path,
    ioctl,
    refused,
)
from vfiodriver import Driver


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def came(fd: int) -> bool:
    """Wait for an interrupt and take it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(300_000)) and os.eventfd_read(fd) > 0


def none_came(*fds: int) -> bool:
    return all(refused(os.eventfd_read, fd) == "EAGAIN" for fd in fds)


def pack(*fds: int) -> bytes:
    return struct.pack(f"<{len(fds)}i", *fds)


@pytest.mark.parametrize("path", PATHS)
@inside()
def test_how_many_there_are_of_each_kind(path: Path, served: Served) -> None:
    device = Attached(path).device
    counts = [device.irq(kind)[1] for kind in (INTX, MSI, MSIX, ERR_IRQ, REQ_IRQ)]
    assert counts == [1, 4, 4, 1, 1]
    assert device.irq(MSIX)[0] & 1  # EVENTFD
    assert refused(device.irq, 5) == "EINVAL"


@pytest.mark.parametrize("path", PATHS)
@inside()
def test_each_vector_signals_its_own_eventfd(path: Path, served: Served) -> None:
    device = Attached(path).device
    driver = Driver(device, served)
    fds = [eventfd() for _ in range(4)]
    device.set_irqs(DATA_EVENTFD | TRIGGER, MSIX, 0, 4, pack(*fds))
    for vector in (2, 0, 3, 1):
        driver["irq_raise"] = vector
        assert came(fds[vector])
        assert none_came(*fds)
    device.set_irqs(DATA_NONE | TRIGGER, MSIX, 1, 2)
    assert came(fds[1])
    assert came(fds[2])
    device.set_irqs(DATA_BOOL | TRIGGER, MSIX, 0, 4, b"\1\0\0\1")
    assert came(fds[0])
    assert came(fds[3])
    assert none_came(*fds)
    device.set_irqs(DATA_NONE | TRIGGER, MSIX, 0, 0)
    driver["irq_raise"] = 2
    assert driver["irq_count"] > 0
    assert none_came(*fds)


@inside()
def test_intx_is_masked_until_it_is_unmasked(served: Served) -> None:
    """A level: it comes again after the unmask for as long as its cause is there."""
    device = Attached("type1").device
    driver = Driver(device, served)
    fd = eventfd()
    device.set_irqs(DATA_EVENTFD | TRIGGER, INTX, 0, 1, pack(fd))
    driver["irq_raise"] = 0
    assert came(fd)
    driver["irq_raise"] = 0
    assert driver["irq_count"] >= 1
    assert none_came(fd)
    device.set_irqs(DATA_NONE | UNMASK, INTX, 0, 1)
    assert came(fd)
    causes = driver["intx_causes"]
    assert causes
    driver["intx_causes"] = causes  # written back, they are gone
    assert driver["intx_causes"] == 0
    device.set_irqs(DATA_NONE | UNMASK, INTX, 0, 1)
    device.set_irqs(DATA_NONE | MASK, INTX, 0, 1)
    assert none_came(fd)


@inside()
def test_intx_is_unmasked_by_an_eventfd(served: Served) -> None:
    """KVM's resample, signalled when the guest is done: the interrupt comes again if its cause is there."""
    device = Attached("type1").device
    driver = Driver(device, served)
    fd, resample, other = eventfd(), eventfd(), eventfd()
    device.set_irqs(DATA_EVENTFD | TRIGGER, INTX, 0, 1, pack(fd))
    for one in (other, resample):  # the second takes the place of the first
        device.set_irqs(DATA_EVENTFD | UNMASK, INTX, 0, 1, pack(one))
    driver["irq_raise"] = 0
    assert came(fd)
    for _ in range(3):
        os.eventfd_write(resample, 1)
        assert came(fd)
    os.eventfd_write(other, 1)
    assert refused(device.set_irqs, DATA_EVENTFD | UNMASK, INTX, 0, 1, pack(999)) == "EBADF"
    device.set_irqs(DATA_EVENTFD | UNMASK, INTX, 0, 1, pack(-1))
    os.eventfd_write(resample, 1)
    assert driver["irq_count"] >= 1
    assert none_came(fd)
    assert os.eventfd_read(resample) == 1  # nobody listens any more
    assert os.eventfd_read(other) == 1
    device.set_irqs(DATA_EVENTFD | UNMASK, INTX, 0, 1, pack(resample))
    device.set_irqs(DATA_NONE | TRIGGER, INTX, 0, 0)
    os.eventfd_write(resample, 1)
    assert os.eventfd_read(resample) == 1
    device.set_irqs(
        DATA_EVENTFD | UNMASK, INTX, 0, 1, pack(resample)
    )  # and the device goes with it listening


@inside()
def test_what_makes_no_sense_is_einval(served: Served) -> None:
    """The kernel's own checks, and those of the server."""
    device = Attached("iommufd-cdev").device
    fd = eventfd()
    nonsense = (
        (0, MSIX, 0, 1, b""),
        (DATA_NONE, MSIX, 0, 1, b""),
        (TRIGGER, MSIX, 0, 1, b""),
        (DATA_NONE | DATA_BOOL | TRIGGER, MSIX, 0, 1, b"\1"),
        (DATA_NONE | TRIGGER | MASK, MSIX, 0, 1, b""),
        (DATA_NONE | TRIGGER | 1 << 9, MSIX, 0, 1, b""),
        (DATA_NONE | TRIGGER, 5, 0, 1, b""),
        (DATA_NONE | TRIGGER, MSIX, 0, 5, b""),
        (DATA_NONE | TRIGGER, MSIX, 3, 2, b""),
        (DATA_NONE | TRIGGER, MSIX, 1 << 31, 1, b""),
        (DATA_EVENTFD | TRIGGER, MSIX, 0, 2, pack(fd)),
        (DATA_EVENTFD | TRIGGER, MSIX, 0, 1 << 31, pack(fd)),
        (DATA_BOOL | TRIGGER, MSIX, 0, 2, b"\1"),
        (DATA_EVENTFD | TRIGGER, MSIX, 0, 0, b""),
    )
    for arguments in nonsense:
        assert refused(device.set_irqs, *arguments) == "EINVAL", arguments
    assert refused(device.set_irqs, DATA_EVENTFD | TRIGGER, MSIX, 0, 1, pack(999)) == "EBADF"
    assert refused(ioctl, device.fd, DEVICE_SET_IRQS, "IIIII", 16, 33, 2, 0, 0) == "EINVAL"
    assert device.irq(MSIX)[1] == 4


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/stderr"})
def many_vectors(served: Served) -> None:
    device = Attached("iommufd-cdev").device
    driver = Driver(device, served)
    fds = [eventfd() for _ in range(32)]
    fds[9], fds[10], fds[11] = -1, -1, -1
    device.set_irqs(DATA_EVENTFD | TRIGGER, MSIX, 0, 32, pack(*fds))
    for vector in (0, 7, 8, 12, 31):
        driver["irq_raise"] = vector
        assert came(fds[vector])
    assert none_came(*(fd for fd in fds if fd >= 0))


def test_vectors_go_in_batches_that_are_all_valid_or_all_none(
    serve_one: Callable[..., Served], run_inside: Callable[..., str]
) -> None:
    """The server takes 8 descriptors with a message, and -1 is no descriptor."""
    said = run_inside(many_vectors, served=serve_one("--msix-vectors", "32"))
    batches = re.findall(r"SET_IRQS kind 2 flags 0x24 \[(\d+), \+(\d+)\) with (\d+) descriptors: ok", said)
    assert [tuple(map(int, batch)) for batch in batches] == [
        (0, 8, 8), (8, 1, 1), (9, 3, 0), (12, 8, 8), (20, 8, 8), (28, 4, 4),
    ]  # fmt: skip
