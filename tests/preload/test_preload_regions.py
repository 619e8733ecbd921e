"""Regions: what they are, reading, writing and mapping them."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable

import pytest
from inside import Served, inside
from vfio import CONFIG, PATHS, Attached, Path, refused
from vfiodriver import MEMORY_BAR, Driver

READ, WRITE, MMAP, CAPS = 1, 2, 4, 8
SPARSE, MSIX_MAPPABLE = 1, 3
KIB = 1 << 10


@pytest.mark.parametrize("path", PATHS)
@inside()
def test_regions_have_the_kernels_places(path: Path, served: Served) -> None:
    """Region n begins at n << 40; one that there is not has no size; beyond the last: EINVAL."""
    device = Attached(path).device
    for index in range(9):
        flags, size, offset, _ = device.region(index)
        assert offset == index << 40
        assert bool(flags & (READ | WRITE)) == (size > 0)
    assert device.region(MEMORY_BAR)[1] == served.memory_bytes
    assert refused(device.region, 9) == "EINVAL"


@inside()
def test_access_ends_with_the_region(served: Served) -> None:
    """A read across the end is short; one behind it EINVAL; none at all 0 bytes."""
    device = Attached("iommufd-cdev").device
    size = device.region(CONFIG)[1]
    assert device.read(CONFIG, 0, 4) == struct.pack("<HH", 0x4656, 0x4455)
    assert len(device.read(CONFIG, size - 4, 16)) == 4
    assert refused(device.read, CONFIG, size, 4) == "EINVAL"
    assert refused(device.read, 63, 0, 4) == "EINVAL"
    assert refused(device.write, CONFIG, size, b"1234") == "EINVAL"
    assert refused(device.read, 5, 0, 4) == "EINVAL"
    assert device.read(MEMORY_BAR, 0, 0) == b""


@inside()
def test_what_is_written_is_read(served: Served) -> None:
    """In every width, and in pieces larger than one message may be."""
    device = Attached("iommufd-cdev").device
    for width in (1, 2, 4, 8):
        data = bytes(range(width))
        assert device.write(MEMORY_BAR, 64 * width, data) == width
        assert device.read(MEMORY_BAR, 64 * width, width) == data
    whole = os.urandom(served.memory_bytes)
    assert device.write(MEMORY_BAR, 0, whole) == len(whole)
    assert device.read(MEMORY_BAR, 0, len(whole) + 5) == whole


@inside()
def test_vectors_are_read_and_written_piece_by_piece(served: Served) -> None:
    device = Attached("iommufd-cdev").device
    place = (MEMORY_BAR << 40) + 128
    assert os.pwritev(device.fd, [b"abcd", b"", b"efgh"], place) == 8
    parts = [bytearray(3), bytearray(5)]
    assert os.preadv(device.fd, parts, place) == 8
    assert bytes(parts[0] + parts[1]) == b"abcdefgh"
    end = (CONFIG << 40) + device.region(CONFIG)[1] - 4
    assert os.preadv(device.fd, [bytearray(3), bytearray(5)], end) == 4
    for call in (os.readv, os.writev):
        assert refused(call, device.fd, [bytearray(4)]) == "EINVAL"
    assert refused(os.read, device.fd, 4) == "EINVAL"
    assert refused(os.write, device.fd, b"1234") == "EINVAL"


@inside()
def test_a_buffer_that_is_not_there_is_efault_and_the_device_lives_on(served: Served) -> None:
    """As in the kernel; the connection is not lost over it."""
    import ctypes

    device = Attached("iommufd-cdev").device
    libc = ctypes.CDLL(None, use_errno=True)
    libc.pread64.restype = libc.pwrite64.restype = ctypes.c_ssize_t
    libc.pread64.argtypes = libc.pwrite64.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int64,
    ]
    for call in (libc.pread64, libc.pwrite64):
        assert call(device.fd, 8, 4096, MEMORY_BAR << 40) == -1
        assert os.strerror(ctypes.get_errno()) == os.strerror(14)
    assert device.read(CONFIG, 0, 2) == b"VF"


@inside()
def test_what_is_trapped_cannot_be_mapped(served: Served) -> None:
    """The flag is not there, and mmap() fails as the kernel's does."""
    device = Attached("iommufd-cdev").device
    assert not device.region(MEMORY_BAR)[0] & MMAP
    assert refused(mmap.mmap, device.fd, 4096, mmap.MAP_SHARED, 3, 0, MEMORY_BAR << 40) == "EINVAL"


@inside()
def mapped_memory(served: Served) -> None:
    device = Attached("iommufd-cdev").device
    flags, size, offset, _ = device.region(MEMORY_BAR)
    assert flags & MMAP
    with mmap.mmap(
        device.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset
    ) as memory:
        device.write(MEMORY_BAR, 0x1000, b"by message")
        assert memory[0x1000:0x100A] == b"by message"
        memory[0x2000:0x2006] = b"direct"
        assert device.read(MEMORY_BAR, 0x2000, 6) == b"direct"
    with mmap.mmap(device.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset + size - 4096) as tail:
        assert len(tail) == 4096
    assert refused(mmap.mmap, device.fd, 8192, mmap.MAP_SHARED, 3, 0, offset + size - 4096) == "EINVAL"
    assert refused(mmap.mmap, device.fd, 4096, mmap.MAP_PRIVATE, 3, 0, offset) == "EINVAL"
    assert refused(mmap.mmap, device.fd, 4096, mmap.MAP_SHARED, 3, 0, CONFIG << 40) == "EINVAL"
    assert refused(mmap.mmap, device.fd, 4096, mmap.MAP_SHARED, 3, 0, 63 << 40) == "EINVAL"


def test_memory_that_the_server_lets_be_mapped_is_mapped(
    serve_one: Callable[..., Served], run_inside: Callable[..., None]
) -> None:
    """Both ways see the same bytes; what does not fit is EINVAL."""
    run_inside(mapped_memory, served=serve_one("--access", "mmap"))


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/stderr"})
def test_small_writes_to_bars_are_posted_and_in_order(served: Served) -> None:
    """A read behind them sees them all: the server takes messages in order."""
    driver = Driver(Attached("iommufd-cdev").device, served)
    for value in range(500):
        driver["window"] = 0x1000 * value
    assert driver["window"] == 0x1000 * 499
