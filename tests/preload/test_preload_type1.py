"""Containers and groups: the older way, against `<linux/vfio.h>` and the kernel's answers."""

from __future__ import annotations

import fcntl
import os
import struct

from inside import Served, inside
from vfio import (
    CHECK_EXTENSION,
    FIRST_GROUP,
    GET_API_VERSION,
    GROUP_GET_DEVICE_FD,
    GROUP_GET_STATUS,
    GROUP_SET_CONTAINER,
    GROUP_UNSET_CONTAINER,
    IOMMU_DIRTY_PAGES,
    IOMMU_GET_INFO,
    IOMMU_MAP_DMA,
    IOMMU_UNMAP_DMA,
    PAGE,
    READ,
    SET_IOMMU,
    WRITE,
    Attached,
    Memory,
    ioctl,
    refused,
)

U64 = (1 << 64) - 1
TYPE1, TYPE1V2, UNMAP_ALL, UPDATE_VADDR = 1, 3, 9, 10
FLAG_DIRTY, FLAG_ALL, FLAG_VADDR = 1, 2, 4


@inside()
def test_from_a_group_to_a_device(served: Served) -> None:
    """Each step needs the one before it, and says EINVAL without."""
    group = os.open(f"/dev/vfio/{FIRST_GROUP}", os.O_RDWR)
    container = os.open("/dev/vfio/vfio", os.O_RDWR)
    name = bytearray(b"0000:00:00.0\0")
    assert fcntl.ioctl(container, GET_API_VERSION) == 0
    assert ioctl(group, GROUP_GET_STATUS, "II", 8, 0)[1] == 1  # viable
    assert refused(os.open, f"/dev/vfio/{FIRST_GROUP}", os.O_RDWR) == "EBUSY"
    assert refused(fcntl.ioctl, group, GROUP_GET_DEVICE_FD, name, True) == "EINVAL"
    assert refused(fcntl.ioctl, container, SET_IOMMU, TYPE1V2) == "EINVAL"
    assert refused(fcntl.ioctl, group, GROUP_UNSET_CONTAINER) == "EINVAL"
    ioctl(group, GROUP_SET_CONTAINER, "i", container)
    assert ioctl(group, GROUP_GET_STATUS, "II", 8, 0)[1] == 3  # viable, and in a container
    assert refused(ioctl, group, GROUP_SET_CONTAINER, "i", container) == "EINVAL"
    assert refused(fcntl.ioctl, group, GROUP_GET_DEVICE_FD, name, True) == "EINVAL"
    for request, layout in ((IOMMU_GET_INFO, "IIQ"), (IOMMU_MAP_DMA, "IIQQQ"), (IOMMU_UNMAP_DMA, "IIQQ")):
        assert refused(ioctl, container, request, layout, *[40] * len(layout)) == "EINVAL"
    assert refused(fcntl.ioctl, container, SET_IOMMU, 7) == "EINVAL"
    fcntl.ioctl(container, SET_IOMMU, TYPE1V2)
    assert refused(fcntl.ioctl, container, SET_IOMMU, TYPE1V2) == "EINVAL"
    device = fcntl.ioctl(group, GROUP_GET_DEVICE_FD, name, True)
    assert refused(fcntl.ioctl, group, GROUP_UNSET_CONTAINER) == "EBUSY"
    assert refused(fcntl.ioctl, group, GROUP_GET_DEVICE_FD, name, True) == "EBUSY"
    os.close(device)
    fcntl.ioctl(group, GROUP_UNSET_CONTAINER)
    os.close(group)
    os.close(os.open(f"/dev/vfio/{FIRST_GROUP}", os.O_RDWR))


@inside()
def test_a_group_is_not_put_into_what_is_no_container(served: Served) -> None:
    group = os.open(f"/dev/vfio/{FIRST_GROUP}", os.O_RDWR)
    for fd in (os.open("/dev/null", os.O_RDWR), os.open("/dev/iommu", os.O_RDWR), group, 999):
        assert refused(ioctl, group, GROUP_SET_CONTAINER, "i", fd) == "EINVAL"
    assert refused(fcntl.ioctl, group, 0x3B99) == "ENOTTY"


@inside()
def test_extensions(served: Served) -> None:
    """Both versions, and unmapping all; not what CPR needs."""
    container = os.open("/dev/vfio/vfio", os.O_RDWR)
    have = {number for number in range(16) if fcntl.ioctl(container, CHECK_EXTENSION, number)}
    assert have == {TYPE1, TYPE1V2, 4, UNMAP_ALL}
    assert UPDATE_VADDR not in have


@inside()
def test_what_the_iommu_is_like(served: Served) -> None:
    """All addresses, pages from 4 KiB, 65535 mappings less those there are; no dirty tracking."""
    way = Attached("type1")
    way.map(0, Memory(PAGE))
    argsz, flags, sizes = ioctl(way.container, IOMMU_GET_INFO, "IIQ", 16, 0, 0)
    assert (flags, sizes & PAGE) == (3, PAGE)
    assert argsz > 24
    data = bytearray(struct.pack("<IIQII", argsz, 0, 0, 0, 0)) + bytearray(argsz - 24)
    fcntl.ioctl(way.container, IOMMU_GET_INFO, data, True)
    at = struct.unpack_from("<I", data, 16)[0]
    found = {}
    while at:
        identity, version, following = struct.unpack_from("<HHI", data, at)
        assert version == 1
        found[identity] = bytes(data[at + 8 : following or None])
        at = following
    assert set(found) == {1, 3}
    assert struct.unpack("<IIQQ", found[1]) == (1, 0, 0, U64)
    assert struct.unpack_from("<I", found[3])[0] == 65534
    assert refused(ioctl, way.container, IOMMU_GET_INFO, "II", 8, 0) == "EINVAL"


@inside()
def test_mapping(served: Served) -> None:
    way = Attached("type1")
    memory = Memory(16 * PAGE)

    def answer(iova: int, start: int, size: int, flags: int = READ | WRITE) -> str:
        values = (32, flags, memory.address + start, iova, size)
        return refused(ioctl, way.container, IOMMU_MAP_DMA, "IIQQQ", *values)

    assert answer(0x10000, 0, 4 * PAGE) == "ok"
    assert [answer(iova, 0, 2 * PAGE) for iova in (0x10000, 0x13000, 0xF000)] == ["EEXIST"] * 3
    assert [answer(0x20001, 0, PAGE), answer(0x20000, 1, PAGE), answer(0x20000, 0, 1)] == ["EINVAL"] * 3
    assert [answer(0x20000, 0, 0), answer(0x20000, 0, PAGE, 0), answer(0x20000, 0, PAGE, 8)] == ["EINVAL"] * 3
    assert answer(0x20000, 0, PAGE, READ | FLAG_VADDR) == "EINVAL"
    assert answer(U64 - PAGE + 1, 0, 2 * PAGE) == "EINVAL"
    assert refused(ioctl, way.container, IOMMU_MAP_DMA, "IIQQ", 24, 3, 0, 0) == "EINVAL"


@inside()
def test_unmapping(served: Served) -> None:
    """Of nothing: fine, 0 bytes. Of a part of a mapping: EINVAL. All at once with its own flag."""
    way = Attached("type1")
    memory = Memory(16 * PAGE)

    def answer(iova: int, size: int, flags: int = 0) -> str:
        return refused(ioctl, way.container, IOMMU_UNMAP_DMA, "IIQQ", 24, flags, iova, size)

    for iova in (0, 0x4000, 0x8000):
        way.map(iova, memory, size=4 * PAGE)
    assert way.unmap(0x100000, PAGE) == 0
    assert [answer(0x1000, PAGE), answer(0, 3 * PAGE), answer(0x2000, 6 * PAGE)] == ["EINVAL"] * 3
    assert way.unmap(0, 8 * PAGE) == 8 * PAGE
    way.map(0, memory, size=PAGE)
    assert answer(0, PAGE, FLAG_ALL) == "EINVAL"
    assert answer(0, 0, FLAG_DIRTY) == "EINVAL"
    assert answer(0, 0, FLAG_VADDR) == "EINVAL"
    assert answer(0, 0) == "EINVAL"
    assert ioctl(way.container, IOMMU_UNMAP_DMA, "IIQQ", 24, FLAG_ALL, 0, 0)[3] == 5 * PAGE
    assert refused(ioctl, way.container, IOMMU_DIRTY_PAGES, "IIQQQQQ", 48, 1, 0, 0, 0, 0, 0) == "ENOTTY"


@inside()
def test_a_container_without_groups_starts_anew(served: Served) -> None:
    """What QEMU does when its only device is unplugged and plugged again."""
    for _ in range(2):
        way = Attached("type1")
        way.map(0, Memory(PAGE))
        way.close()
