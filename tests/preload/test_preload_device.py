"""A device descriptor's ioctls, one by one, against `<linux/vfio.h>` and the kernel's answers."""

from __future__ import annotations

import fcntl
import os
import struct

import pytest
from inside import Served, inside
from vfio import (
    BIND_IOMMUFD,
    CONFIG,
    DEVICE_GET_INFO,
    DEVICE_GET_REGION_INFO,
    GET_PCI_HOT_RESET_INFO,
    IOEVENTFD,
    MSIX,
    PATHS,
    PCI_HOT_RESET,
    Attached,
    Device,
    Iommufd,
    Path,
    ioctl,
    refused,
)

every_path = pytest.mark.parametrize("path", PATHS)


@every_path
@inside()
def test_info_is_that_of_a_pci_device(path: Path, served: Served) -> None:
    """Flags RESET and PCI, vfio-pci's nine regions and five kinds of interrupts."""
    assert Attached(path).device.info() == (0x3, 9, 5)


@inside()
def test_nothing_works_before_the_device_is_bound(served: Served) -> None:
    """The kernel answers EINVAL to everything but BIND then."""
    device = Device(os.open("/dev/vfio/devices/vfio-user0", os.O_RDWR))
    assert refused(device.info) == "EINVAL"
    assert refused(device.read, CONFIG, 0, 4) == "EINVAL"
    assert refused(device.write, CONFIG, 0, b"1234") == "EINVAL"
    assert refused(device.reset) == "EINVAL"
    assert refused(device.attach, 1) == "EINVAL"
    assert refused(device.detach) == "EINVAL"


@inside()
def test_a_device_is_bound_once_and_to_our_iommufd(served: Served) -> None:
    """A second bind is EINVAL, another open of the same device EBUSY, another kind of file EBADF."""
    iommufd = Iommufd()
    first, second = (Device(os.open("/dev/vfio/devices/vfio-user0", os.O_RDWR)) for _ in range(2))
    assert refused(first.bind, os.open("/dev/null", os.O_RDWR)) == "EBADF"
    assert refused(ioctl, first.fd, BIND_IOMMUFD, "IIiI", 16, 1, iommufd.fd, 0) == "EINVAL"
    assert refused(ioctl, first.fd, BIND_IOMMUFD, "IIiI", 8, 0, iommufd.fd, 0) == "EINVAL"
    assert first.bind(iommufd.fd) > 0
    assert refused(first.bind, iommufd.fd) == "EINVAL"
    assert refused(second.bind, iommufd.fd) == "EBUSY"
    os.close(first.fd)
    assert second.bind(iommufd.fd) > 0
    assert second.info() == (0x3, 9, 5)


@every_path
@inside()
def test_unknown_ioctls_are_enotty(path: Path, served: Served) -> None:
    """What the kernel has and we have not: QEMU takes ENOTTY for that."""
    device = Attached(path).device
    for request in (IOEVENTFD, 0x3B7F, 0x3B99):
        assert refused(fcntl.ioctl, device.fd, request, bytearray(64)) == "ENOTTY"


@inside()
def test_structures_that_are_too_short_are_einval_and_bad_pointers_efault(served: Served) -> None:
    """argsz is checked before anything else is done."""
    device = Attached("iommufd-cdev").device
    for request, layout in ((DEVICE_GET_INFO, "IIII"), (DEVICE_GET_REGION_INFO, "IIIIQQ")):
        values = [0] * len(layout)
        assert refused(ioctl, device.fd, request, layout, *values) == "EINVAL"
        assert refused(fcntl.ioctl, device.fd, request, 8) == "EFAULT"


@every_path
@inside()
def test_reset_works(path: Path, served: Served) -> None:
    """It resets: a register that was written is zero again."""
    device = Attached(path).device
    offset, _ = served.registers["window"]
    device.write(0, offset, struct.pack("<Q", 0x1000))
    assert device.read(0, offset, 8) != bytes(8)
    device.reset()
    assert device.read(0, offset, 8) == bytes(8)


@every_path
@inside()
def test_a_hot_reset_is_of_this_device_alone(path: Path, served: Served) -> None:
    """By group for a container, by id for an iommufd; with room for nothing, ENOSPC."""
    attached = Attached(path)
    device = attached.device
    flags, count, (dependent,) = device.hot_reset_info()
    assert count == 1
    if path == "type1":
        assert (flags, dependent[0]) == (0, 1_000_000)
    else:
        assert (flags, dependent[0]) == (0x3, attached.id)
    assert refused(device.hot_reset_info, 0) == "ENOSPC"
    assert refused(ioctl, device.fd, GET_PCI_HOT_RESET_INFO, "III", 8, 0, 0) == "EINVAL"
    fds = (attached.group,) if path == "type1" else ()
    offset, _ = served.registers["window"]
    device.write(0, offset, struct.pack("<Q", 0x1000))
    ioctl(device.fd, PCI_HOT_RESET, "III" + "i" * len(fds), 12 + 4 * len(fds), 0, len(fds), *fds)
    assert device.read(0, offset, 8) == bytes(8)
    wrong = () if path == "type1" else (3,)
    layout = "III" + "i" * len(wrong)
    assert refused(ioctl, device.fd, PCI_HOT_RESET, layout, 12, 0, len(wrong), *wrong) == "EINVAL"


@every_path
@inside()
def test_two_devices_in_one_address_space(path: Path, served: Served) -> None:
    """Both answer, each as itself."""
    first = Attached(path)
    second = Attached(path, 1, beside=first)
    offset, size = served.registers["fill"]
    fills = [device.read(0, offset, size) for device in (first.device, second.device)]
    assert fills == [(7).to_bytes(8, "little"), (8).to_bytes(8, "little")]


@every_path
@inside()
def test_it_can_be_let_go_of_and_taken_again(path: Path, served: Served) -> None:
    """As hot unplug and plug do it: the server is free again at once."""
    for _ in range(2):
        attached = Attached(path)
        assert attached.device.irq(MSIX)[1] == 4
        attached.close()
        if path == "iommufd-fd":
            break  # the descriptors were given once
