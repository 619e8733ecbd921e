"""DMA: through descriptors and by message, and which pages it made dirty."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable

import pytest
from inside import Served, inside
from vfio import (
    DEVICE_FEATURE,
    GET,
    LOG_REPORT,
    LOG_START,
    LOG_STOP,
    PAGE,
    PATHS,
    READ,
    SET,
    WRITE,
    Attached,
    Memory,
    Path,
    address_of,
    ioctl,
    refused,
)
from vfiodriver import CHECKSUM_GUEST, DONE, FORBIDDEN, UNMAPPED, Driver, until

MIB = 1 << 20
FILL = b"\x5a"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("path", PATHS)
@inside()
def test_the_device_reaches_memory(path: Path, shared: bool, served: Served) -> None:
    """By descriptor where there is one, else by message; and no more once it is unmapped."""
    way = Attached(path)
    driver = Driver(way.device, served)
    memory = Memory(MIB, shared)
    way.map(0x100000, memory)
    memory[0:4096] = os.urandom(4096)
    assert driver.fill(0x100000 + 8000, 70000) == DONE
    assert memory[8000:78000] == FILL * 70000
    assert (memory[7999:8000], memory[78000:78001]) == (b"\0", b"\0")
    assert driver.dma(CHECKSUM_GUEST, 0x100000, 4096) == DONE
    assert driver.fill(0x100000 + MIB - 8, 16) == UNMAPPED
    assert way.unmap(0x100000, MIB) == MIB
    assert driver.fill(0x100000, 8) == UNMAPPED


@pytest.mark.parametrize("shared", [True, False])
@inside()
def test_a_direction_that_was_not_allowed_is_not_taken(shared: bool, served: Served) -> None:
    """ROMs are for reading only."""
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    memory = Memory(2 * PAGE, shared)
    way.map(0, memory, READ, size=PAGE)
    assert driver.fill(0, 8) == FORBIDDEN
    assert memory[0:8] == bytes(8)
    assert driver.dma(CHECKSUM_GUEST, 0, PAGE) == DONE


@inside()
def test_memory_that_went_away_without_an_unmap_is_no_crash(served: Served) -> None:
    """EFAULT for the device, whatever its server makes of that; the program lives on."""
    way = Attached("type1")
    driver = Driver(way.device, served)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, ctypes.c_size_t(4 * PAGE), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ioctl(way.container, 0x3B71, "IIQQQ", 32, READ | WRITE, address, 0, 4 * PAGE)
    assert driver.fill(0, 4 * PAGE) == DONE
    libc.munmap(address, 4 * PAGE)
    assert driver.fill(0, 4 * PAGE) != DONE
    assert way.device.info()[1] == 9


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/stderr"})
def kinds_of_memory(served: Served) -> None:
    way = Attached("type1")
    driver = Driver(way.device, served)

    def works(place: int, address: int, size: int) -> None:
        ioctl(way.container, 0x3B71, "IIQQQ", 32, READ | WRITE, address, place, size)
        assert driver.fill(place, 8) == DONE
        assert ctypes.string_at(address, 8) == FILL * 8
        assert way.unmap(place, size) == size

    memory = Memory(4 * PAGE)
    works(0x100000, memory.address, 4 * PAGE)  # a file, whole
    works(0x200000, memory.address + PAGE, 2 * PAGE)  # a part of it
    private = mmap.mmap(memory.fd, 4 * PAGE, flags=mmap.MAP_PRIVATE)
    works(0x300000, address_of(private), 4 * PAGE)  # its private copy: not the file
    anonymous = mmap.mmap(-1, 4 * PAGE)
    works(0x400000, address_of(anonymous), 4 * PAGE)  # shared, but of no file that is open
    short = Memory(4 * PAGE)
    os.ftruncate(short.fd, 3 * PAGE)
    works(0x500000, short.address, 4 * PAGE)  # the file ends before the mapping does
    odd = Memory(3 * PAGE + 100)
    works(0x600000, odd.address, 4 * PAGE)  # it ends within the last page: no server takes that
    place = Memory(4 * PAGE, shared=False)
    file = os.memfd_create("read-only")
    os.ftruncate(file, 4 * PAGE)
    mmap_at(place.address, file)
    os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    os.close(file)
    works(0x700000, place.address, 4 * PAGE)  # no descriptor to write with
    two = Memory(8 * PAGE)
    mmap_at(two.address + 4 * PAGE, Memory(4 * PAGE).fd)
    works(0x800000, two.address, 8 * PAGE)  # two files side by side


def mmap_at(address: int, fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    assert libc.mmap(address, 4 * PAGE, 3, mmap.MAP_SHARED | 0x10, fd, 0) == address


def test_descriptors_are_given_for_shared_mappings_of_one_file(
    served: Served, run_inside: Callable[..., str]
) -> None:
    """Whatever the kind of memory, the device's write arrives where the program sees it."""
    said = run_inside(kinds_of_memory, served=served)
    ways = dict(re.findall(r"DMA_MAP \[(0x\w+), .*? (by \w+): ok", said))
    assert ways == {
        "0x100000": "by descriptor", "0x200000": "by descriptor", "0x300000": "by message",
        "0x400000": "by message", "0x500000": "by message", "0x600000": "by message",
        "0x700000": "by message", "0x800000": "by message",
    }  # fmt: skip


@pytest.mark.parametrize("start", [0, 3])
@inside()
def test_a_file_is_mapped_by_its_descriptor(start: int, served: Served) -> None:
    """IOMMU_IOAS_MAP_FILE, as QEMU 11 does it; the program may close its own descriptor then."""
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    memory = Memory(8 * PAGE)
    fd = os.dup(memory.fd)
    way.iommufd.map_file(way.ioas, 0, fd, start * PAGE, 4 * PAGE)
    os.close(fd)
    assert driver.fill(PAGE, PAGE) == DONE
    assert memory[(start + 1) * PAGE : (start + 2) * PAGE] == FILL * PAGE
    assert memory[0 : (start + 1) * PAGE] == bytes((start + 1) * PAGE)


@inside({"VFU_DEV_PRELOAD_DMA": "message"})
def test_a_file_is_reached_by_message_too(served: Served) -> None:
    """Where no descriptors are given: nothing of the program's is mapped at the file's place."""
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    memory = Memory(8 * PAGE)
    way.iommufd.map_file(way.ioas, 0, memory.fd, 3 * PAGE, 4 * PAGE)
    assert driver.fill(PAGE, PAGE) == DONE
    assert memory[4 * PAGE : 5 * PAGE] == FILL * PAGE


@inside()
def private_file(served: Served) -> None:
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    memory = Memory(4 * PAGE)
    private = mmap.mmap(memory.fd, 4 * PAGE, flags=mmap.MAP_PRIVATE)
    private[0:4] = b"mine"
    for iova in (0, 0x10000):
        way.iommufd.map_file(way.ioas, iova, memory.fd, 0, 4 * PAGE)
    assert driver.fill(0, 4) == DONE
    assert (memory[0:4], private[0:4]) == (FILL * 4, b"mine")


def test_dma_to_a_file_that_is_mapped_privately_goes_to_the_file(
    served: Served, run_inside: Callable[..., str]
) -> None:
    """As in the kernel. QEMU 10.2 asks for it with share=off, and its guest sees none of it: said, once."""
    said = run_inside(private_file, served=served)
    assert said.count("mapped privately (share=off)") == 1


def huge_pages() -> int:
    """How many pages of 2 MiB are free."""
    with open("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") as file:
        return int(file.read())


@pytest.mark.parametrize("policy", ["auto", "message"])
def test_memory_in_huge_pages(policy: str, served: Served, run_inside: Callable[..., str]) -> None:
    """Whole pages and parts of them, as a machine's RAM is cut up; by descriptor and by message."""
    if huge_pages() < 2:
        try:
            with open("/proc/sys/vm/nr_hugepages", "w") as file:
                file.write("4")
        except OSError:
            pass
    if huge_pages() < 2:
        pytest.skip("no huge pages on this machine: echo 4 >/proc/sys/vm/nr_hugepages")
    run_inside(huge_by_message if policy == "message" else huge, served=served)


@inside()
def huge(served: Served) -> None:
    in_huge_pages(served)


@inside({"VFU_DEV_PRELOAD_DMA": "message"})
def huge_by_message(served: Served) -> None:
    in_huge_pages(served)


def in_huge_pages(served: Served) -> None:
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, 4 * MIB)
    memory = mmap.mmap(fd, 4 * MIB)
    pieces = ((0, 0xA0000), (0xC0000, 0x340000))
    for start, size in pieces:
        way.iommufd.map_file(way.ioas, start, fd, start, size)
        assert driver.fill(start + 0x1000, PAGE) == DONE
        assert memory[start + 0x1000 : start + 0x2000] == FILL * PAGE
        assert way.unmap(start, size) == size
        way.iommufd.map(way.ioas, start, address_of(memory) + start, size)
        assert driver.fill(start + 0x3000, PAGE) == DONE
        assert memory[start + 0x3000 : start + 0x4000] == FILL * PAGE
        assert way.unmap(start, size) == size


# --- which pages are dirty ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("path", PATHS)
@inside()
def test_writes_are_logged_whichever_way_they_go(path: Path, shared: bool, served: Served) -> None:
    """Memory without a descriptor is in nobody's log but the library's own."""
    way = Attached(path)
    driver = Driver(way.device, served)
    way.map(0, Memory(MIB, shared))
    assert driver.fill(0, PAGE) == DONE  # before the log: not in it
    assert way.device.log_start((0, MIB)) == PAGE
    assert way.device.log_report(0, MIB) == set()
    assert driver.fill(3 * PAGE, PAGE) == DONE
    assert driver.fill(100 * PAGE - 4, 8) == DONE
    assert driver.dma(CHECKSUM_GUEST, 50 * PAGE, PAGE) == DONE  # reading dirties nothing
    assert way.device.log_report(0, MIB) == {3, 99, 100}
    assert way.device.log_report(0, MIB) == set()  # reported once
    assert driver.fill(5 * PAGE, 4 * PAGE) == DONE
    assert way.device.log_report(6 * PAGE, 2 * PAGE) == {0, 1}
    assert way.device.log_report(0, MIB) == {5, 8}  # what was not asked for is still there
    way.device.log_stop()
    assert driver.fill(0, PAGE) == DONE
    assert way.device.log_start((0, MIB)) == PAGE
    assert way.device.log_report(0, MIB) == set()


@pytest.mark.parametrize("shared", [True, False])
@inside()
def test_a_report_adds_to_the_callers_bitmap(shared: bool, served: Served) -> None:
    """ "The LOGGING_REPORT will only set bits in the bitmap and never clear"."""
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    way.map(0, Memory(MIB, shared))
    way.device.log_start((0, MIB))
    driver.fill(2 * PAGE, PAGE)
    assert way.device.log_report(0, 64 * PAGE, before=0x01) == {2, *range(0, 64, 8)}


@pytest.mark.parametrize("shared", [True, False])
@inside()
def test_a_report_may_have_larger_pages_than_the_log(shared: bool, served: Served) -> None:
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    way.map(0, Memory(4 * MIB, shared))
    way.device.log_start((0, 4 * MIB))
    for page in (0, 17, 600):
        driver.fill(page * PAGE, PAGE)
    assert way.device.log_report(0, 4 * MIB, 16 * PAGE) == {0, 1, 37}


@inside()
def test_a_large_range_is_asked_for_in_parts(served: Served) -> None:
    """40 GiB: more than the server answers for in one message; the two halves of the log are one."""
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    far = 39 << 30
    way.map(far, Memory(MIB))
    way.map(0, Memory(MIB, shared=False))
    way.device.log_start((0, 40 << 30))
    assert driver.fill(far + 7 * PAGE, PAGE) == DONE
    assert driver.fill(9 * PAGE, PAGE) == DONE
    assert way.device.log_report(0, 40 << 30) == {9, (far >> 12) + 7}


@inside()
def test_what_the_log_refuses(served: Served) -> None:
    """As the kernel's core and drivers do it."""
    way = Attached("iommufd-cdev")
    device = way.device
    way.map(0, Memory(MIB))
    assert refused(device.log_report, 0, MIB) == "EINVAL"  # there is no log
    assert refused(device.log_stop) == "EINVAL"
    assert refused(device.feature, SET | LOG_START, "QIIQ", PAGE, 0, 0, 0) == "EINVAL"  # no range
    assert refused(device.log_start, (0, 0)) == "EINVAL"
    assert refused(device.log_start, (1, PAGE)) == "EINVAL"
    assert refused(device.log_start, ((1 << 64) - PAGE, 2 * PAGE)) == "EOVERFLOW"
    assert refused(device.log_start, *((place * MIB, PAGE) for place in range(257))) == "E2BIG"
    assert refused(device.feature, SET | LOG_START, "QIIQ", PAGE, 1, 0, 8) == "EFAULT"
    assert refused(device.feature, SET | LOG_START, "QII", PAGE, 1, 0) == "EINVAL"
    assert device.log_start(*((place * MIB, PAGE) for place in range(256))) == PAGE
    assert refused(device.log_start, (0, MIB)) == "EBUSY"
    assert refused(device.feature, GET | LOG_REPORT, "QQQQ", 0, 0, PAGE, 0) == "EINVAL"  # of nothing
    assert refused(device.log_report, 0, MIB, 2048) == "EINVAL"
    assert refused(device.log_report, 0, MIB, 3 * PAGE) == "EINVAL"
    assert refused(device.log_report, (1 << 64) - PAGE, 2 * PAGE) == "EOVERFLOW"
    assert refused(device.feature, GET | LOG_REPORT, "QQQQ", 0, MIB, PAGE, 8) == "EFAULT"
    assert refused(ioctl, device.fd, DEVICE_FEATURE, "IIQ", 16, GET | LOG_REPORT, 0) == "EINVAL"
    device.log_stop()
    assert refused(device.feature, GET | LOG_STOP) == "EINVAL"


@inside()
def test_nothing_is_lost_between_a_write_and_its_report(served: Served) -> None:
    """Under the device's own writer: what a copy that follows the log does not have, the log has."""
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    memory, copy = Memory(64 * PAGE, shared=False), bytearray(64 * PAGE)
    way.map(0, memory)
    way.device.log_start((0, 64 * PAGE))
    driver["writer_buffer"], driver["writer_length"] = 0, 64 * PAGE
    driver["writer_rate"], driver["writer_ctrl"] = 64 * MIB, 1

    def follow() -> int:
        dirty = way.device.log_report(0, 64 * PAGE)
        for page in dirty:
            copy[page * PAGE : (page + 1) * PAGE] = memory[page * PAGE : (page + 1) * PAGE]
        return len(dirty)

    passes = [0]

    def round_and_round() -> bool:
        passes[0] += follow() > 0
        return driver["writer_count"] > 640 and passes[0] > 20

    until(round_and_round, "ten times round the buffer")
    driver["writer_ctrl"] = 0
    follow()
    assert bytes(copy) == memory[0 : 64 * PAGE]


@inside({"VFU_DEV_PRELOAD_FAULT": "forget-writes"})
def test_the_same_check_notices_a_log_that_forgets(served: Served) -> None:
    way = Attached("iommufd-cdev")
    driver = Driver(way.device, served)
    way.map(0, Memory(64 * PAGE, shared=False))
    way.device.log_start((0, 64 * PAGE))
    assert driver.fill(0, PAGE) == DONE
    assert way.device.log_report(0, 64 * PAGE) == set()
