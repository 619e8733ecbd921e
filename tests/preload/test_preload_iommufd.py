"""/dev/iommu, one ioctl after the other, against `<linux/iommufd.h>` and the kernel's answers."""

from __future__ import annotations

import fcntl
import os
import struct

import pytest
from inside import Served, inside
from vfio import (
    DESTROY,
    FAULT_QUEUE_ALLOC,
    FIXED,
    GET_HW_INFO,
    HWPT_ALLOC,
    HWPT_GET_DIRTY,
    HWPT_INVALIDATE,
    HWPT_SET_DIRTY,
    IOAS_ALLOC,
    IOAS_ALLOW_IOVAS,
    IOAS_CHANGE_PROCESS,
    IOAS_COPY,
    IOAS_IOVA_RANGES,
    IOAS_MAP,
    IOAS_UNMAP,
    IOMMU_READ,
    OPTION,
    PAGE,
    VFIO_IOAS,
    Attached,
    Device,
    Iommufd,
    Memory,
    address_of,
    ioctl,
    refused,
)

U64 = (1 << 64) - 1


@inside()
def test_objects_have_ids_and_are_destroyed_when_nobody_uses_them(served: Served) -> None:
    """ENOENT: there is none. EBUSY: something is made of it, or attached to it."""
    iommufd = Iommufd()
    first, second = iommufd.alloc(), iommufd.alloc()
    assert 0 != first != second != 0
    iommufd.destroy(second)
    assert refused(iommufd.destroy, second) == "ENOENT"
    assert refused(iommufd.destroy, 0) == "ENOENT"
    assert refused(iommufd.destroy, 1 << 31) == "ENOENT"
    device = Device(os.open("/dev/vfio/devices/vfio-user0", os.O_RDWR))
    identity = device.bind(iommufd.fd)
    hwpt = iommufd.hwpt(identity, first)
    assert refused(iommufd.destroy, first) == "EBUSY"
    device.attach(hwpt)
    assert refused(iommufd.destroy, hwpt) == "EBUSY"
    assert refused(iommufd.destroy, identity) == "EBUSY"
    device.detach()
    iommufd.destroy(hwpt)
    iommufd.destroy(first)
    assert refused(device.attach, first) == "ENOENT"
    assert refused(ioctl, iommufd.fd, IOAS_ALLOC, "III", 12, 1, 0) == "EOPNOTSUPP"


@inside()
def test_an_iommufd_outlives_its_descriptor_while_a_device_uses_it(served: Served) -> None:
    """QEMU closes it before the device."""
    attached = Attached("iommufd-cdev")
    memory = Memory(PAGE)
    attached.map(0, memory)
    os.close(attached.iommufd.fd)
    assert attached.device.info()[1] == 9
    attached.device.detach()
    os.close(attached.device.fd)
    assert refused(ioctl, attached.iommufd.fd, IOAS_ALLOC, "III", 12, 0, 0) == "EBADF"


@inside()
def test_all_addresses_are_allowed(served: Served) -> None:
    """EMSGSIZE says how many ranges there are, as QEMU asks first."""
    iommufd = Iommufd()
    ioas = iommufd.alloc()
    data = bytearray(struct.pack("<IIIIQQ", 32, ioas, 0, 0, 0, 0))
    assert refused(fcntl.ioctl, iommufd.fd, IOAS_IOVA_RANGES, data, True) == "EMSGSIZE"
    ranges = bytearray(16)
    found = ioctl(iommufd.fd, IOAS_IOVA_RANGES, "IIIIQQ", 32, ioas, 1, 0, address_of(ranges), 0)
    assert (found[2], found[5]) == (1, PAGE)
    assert struct.unpack("<QQ", ranges) == (0, U64)
    assert refused(ioctl, iommufd.fd, IOAS_IOVA_RANGES, "IIIIQQ", 32, 99, 0, 0, 0, 0) == "ENOENT"
    assert refused(ioctl, iommufd.fd, IOAS_IOVA_RANGES, "IIIIQQ", 32, ioas, 0, 1, 0, 0) == "EOPNOTSUPP"
    assert refused(ioctl, iommufd.fd, IOAS_IOVA_RANGES, "IIIIQQ", 32, ioas, 1, 0, 8, 0) == "EFAULT"


@pytest.mark.parametrize("attached", [False, True])
@inside()
def test_mapping(attached: bool, served: Served) -> None:
    """EEXIST: something is there. EINVAL: not in pages, or in no direction. EOVERFLOW: past the end."""
    if attached:
        way = Attached("iommufd-cdev")
        iommufd, ioas = way.iommufd, way.ioas
    else:
        iommufd = Iommufd()
        ioas = iommufd.alloc()
    memory = Memory(16 * PAGE)
    iommufd.map(ioas, 0x10000, memory.address, 4 * PAGE)
    for iova in (0x10000, 0x13000, 0xF000):
        assert refused(iommufd.map, ioas, iova, memory.address, 2 * PAGE) == "EEXIST"
    iommufd.map(ioas, 0x14000, memory.address, PAGE)
    for iova, address, size in ((0x100, 0, PAGE), (0x20000, 0x100, PAGE), (0x20000, 0, 100), (0x20000, 0, 0)):
        assert refused(iommufd.map, ioas, iova, memory.address + address, size) == "EINVAL"
    assert refused(iommufd.map, ioas, 0x20000, memory.address, PAGE, 0) == "EINVAL"
    assert refused(iommufd.map, ioas, U64 - PAGE + 1, memory.address, 2 * PAGE) == "EOVERFLOW"
    if not attached:  # our server takes no mapping that ends where addresses do
        iommufd.map(ioas, U64 - PAGE + 1, memory.address, PAGE)
    assert refused(iommufd.map, 99, 0x20000, memory.address, PAGE) == "ENOENT"
    map_it = (iommufd.fd, IOAS_MAP, "IIIIQQQ", 40)
    assert refused(ioctl, *map_it, 1 << 7, ioas, 0, memory.address, PAGE, 0x20000) == "EOPNOTSUPP"
    assert refused(ioctl, *map_it, IOMMU_READ, ioas, 0, memory.address, PAGE, 0x20000) == "EOPNOTSUPP"
    assert refused(ioctl, *map_it, FIXED | IOMMU_READ, ioas, 1, memory.address, PAGE, 0x20000) == "EOPNOTSUPP"


@inside()
def test_unmapping(served: Served) -> None:
    """Whole mappings, one or more; ENOENT for nothing and for a part. Zero to the end is everything."""
    way = Attached("iommufd-cdev")
    iommufd, ioas = way.iommufd, way.ioas
    memory = Memory(16 * PAGE)
    for iova in (0, 0x4000, 0x8000):
        iommufd.map(ioas, iova, memory.address, 4 * PAGE)
    assert refused(iommufd.unmap, ioas, 0x20000, PAGE) == "ENOENT"
    for iova, size in ((0x1000, PAGE), (0, 3 * PAGE), (0x2000, 6 * PAGE)):
        assert refused(iommufd.unmap, ioas, iova, size) == "ENOENT"
    assert iommufd.unmap(ioas, 0, 8 * PAGE) == 8 * PAGE
    assert iommufd.unmap(ioas, 0x8000, 64 * PAGE) == 4 * PAGE
    assert iommufd.unmap(ioas, 0, U64) == 0
    iommufd.map(ioas, 0, memory.address, PAGE)
    iommufd.map(ioas, 0x8000, memory.address, PAGE)
    assert iommufd.unmap(ioas, 0, U64) == 2 * PAGE
    assert refused(iommufd.unmap, ioas, 0, 0) == "EINVAL"
    assert refused(iommufd.unmap, ioas, PAGE, U64) == "EOVERFLOW"
    assert refused(iommufd.unmap, 99, 0, PAGE) == "ENOENT"


@inside()
def test_mapping_a_file(served: Served) -> None:
    """Of a regular file that is long enough; EINVAL otherwise."""
    way = Attached("iommufd-cdev")
    memory = Memory(16 * PAGE)
    way.iommufd.map_file(way.ioas, 0, memory.fd, 0, 8 * PAGE)
    way.iommufd.map_file(way.ioas, 0x10000, memory.fd, 8 * PAGE, 8 * PAGE)
    for fd, start, size in ((memory.fd, 8 * PAGE, 9 * PAGE), (memory.fd, 1 << 40, PAGE), (999, 0, PAGE)):
        assert refused(way.iommufd.map_file, way.ioas, 0x40000, fd, start, size) == "EINVAL"
    pipe, _ = os.pipe()
    assert refused(way.iommufd.map_file, way.ioas, 0x40000, pipe, 0, PAGE) == "EINVAL"
    assert refused(way.iommufd.map_file, way.ioas, 0x10000, memory.fd, 0, PAGE) == "EEXIST"
    read_only = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
    assert refused(way.iommufd.map_file, way.ioas, 0x40000, read_only, 0, PAGE) == "EINVAL"


@inside()
def test_what_hardware_there_is(served: Served) -> None:
    """None: no type, no dirty tracking; the caller's buffer is cleared."""
    way = Attached("iommufd-cdev")
    data = bytearray(b"\xff" * 300)
    found = ioctl(way.iommufd.fd, GET_HW_INFO, "IIIIQIIQ", 40, 0, way.id, 300, address_of(data), 9, 0, 9)
    assert (found[3], found[5], found[7]) == (0, 0, 0)
    assert bytes(data) == bytes(300)
    assert refused(way.iommufd.hw_info, way.ioas) == "ENOENT"
    assert refused(ioctl, way.iommufd.fd, GET_HW_INFO, "IIIIQII", 40, 0, way.id, 8, 8, 0, 0) == "EFAULT"


@inside()
def test_page_tables(served: Served) -> None:
    """Plain ones only: no dirty tracking by an IOMMU, nothing nested."""
    way = Attached("iommufd-cdev")
    assert refused(way.iommufd.hwpt, way.id, way.ioas, 1 << 1) == "EOPNOTSUPP"
    assert refused(way.iommufd.hwpt, way.id, way.ioas, 0, 1) == "EOPNOTSUPP"
    assert refused(way.iommufd.hwpt, way.id, 99) == "ENOENT"
    assert refused(way.iommufd.hwpt, way.ioas, way.ioas) == "ENOENT"
    hwpt = way.iommufd.hwpt(way.id, way.ioas)
    way.device.attach(hwpt)  # replaces the attachment to the address space itself
    assert refused(ioctl, way.iommufd.fd, HWPT_ALLOC, "IIII", 16, 0, way.id, way.ioas) == "EINVAL"


@inside()
def test_the_process_cannot_be_changed_once_memory_is_mapped(served: Served) -> None:
    """QEMU 10.2 crashes if the question fails at the start, and refuses CPR if it fails later."""
    way = Attached("iommufd-cdev")
    memory = Memory(PAGE)
    assert refused(ioctl, way.iommufd.fd, IOAS_CHANGE_PROCESS, "II", 8, 0) == "ok"
    assert refused(ioctl, way.iommufd.fd, IOAS_CHANGE_PROCESS, "II", 8, 1) == "EOPNOTSUPP"
    way.map(0, memory)
    assert refused(ioctl, way.iommufd.fd, IOAS_CHANGE_PROCESS, "II", 8, 0) == "EINVAL"


@inside({"VFU_DEV_PRELOAD_CPR": "refuse"})
def test_or_it_is_not_known_from_the_start(served: Served) -> None:
    """As in a kernel before it: QEMU 11.1 blocks CPR then, with a reason."""
    way = Attached("iommufd-cdev")
    assert refused(ioctl, way.iommufd.fd, IOAS_CHANGE_PROCESS, "II", 8, 0) == "ENOTTY"
    way.map(0, Memory(PAGE))
    assert refused(ioctl, way.iommufd.fd, IOAS_CHANGE_PROCESS, "II", 8, 0) == "ENOTTY"


@inside()
def test_what_is_not_there_is_enotty(served: Served) -> None:
    """As in a kernel that is older than it."""
    way = Attached("iommufd-cdev")
    for request in (
        IOAS_COPY, IOAS_ALLOW_IOVAS, OPTION, VFIO_IOAS, HWPT_SET_DIRTY, HWPT_GET_DIRTY,
        HWPT_INVALIDATE, FAULT_QUEUE_ALLOC, 0x3BAA,
    ):  # fmt: skip
        assert refused(fcntl.ioctl, way.iommufd.fd, request, bytearray(64), True) == "ENOTTY"


@inside()
def test_the_size_of_a_structure_is_taken_as_the_kernel_takes_it(served: Served) -> None:
    """Shorter than the first version: EINVAL. Longer: fine if it is zeros there, else E2BIG."""
    iommufd = Iommufd()
    assert refused(ioctl, iommufd.fd, IOAS_ALLOC, "III", 8, 0, 0) == "EINVAL"
    assert ioctl(iommufd.fd, IOAS_ALLOC, "IIIII", 20, 0, 0, 0, 0)[2] > 0
    assert refused(ioctl, iommufd.fd, IOAS_ALLOC, "IIIII", 20, 0, 0, 0, 1) == "E2BIG"
    assert refused(ioctl, iommufd.fd, IOAS_ALLOC, "III", 1 << 20, 0, 0) == "E2BIG"
    assert refused(fcntl.ioctl, iommufd.fd, DESTROY, 8) == "EFAULT"
    assert refused(ioctl, iommufd.fd, IOAS_UNMAP, "IIQ", 16, 1, 0) == "EINVAL"
