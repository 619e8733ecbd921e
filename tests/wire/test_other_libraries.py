"""Our server on libraries with upstream's interface, of 2023 and of June 2026.

CI has no upstream library. What stands in for it is ours without our additions, and `upstream.c` in front of
that for the present interface. VFU_DEV_UPSTREAM_LIBRARY=PATH runs the same tests with the real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dmakit import KIB, MIB, Driver
from serverkit import PATIENCE_SECONDS, RunningServer, ServerFactory, server_farm

from vfu_dev.builds import artifact
from vfu_dev.client import ClientOptions, Migrator, VfioUserDevice
from vfu_dev.device.reference.layout import Op, Status
from vfu_dev.uapi import DeviceState

RAM, MESSAGES = 0x100000, 0x400000
REAL = os.environ.get("VFU_DEV_UPSTREAM_LIBRARY")


def stand_in(folder: Path) -> Path:
    """Compile the present interface in front of our library without our additions."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc)")
    earlier = artifact("libvfio-user-reduced", build=True)
    target = folder / "libvfio-user-present.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,--no-as-needed"]
    source = Path(__file__).with_name("upstream.c")
    run_path = f"-Wl,-rpath,{earlier.parent}"
    subprocess.run([compiler, *flags, run_path, "-o", target, source, earlier, "-ldl"], check=True)
    return target


@pytest.fixture(scope="module", params=["of 2023", "of June 2026", *(["real"] if REAL else [])])
def other_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "of 2023":
        return artifact("libvfio-user-reduced", build=True)
    if request.param == "real":
        return Path(str(REAL))
    return stand_in(tmp_path_factory.mktemp("library"))


@pytest.fixture
def other(other_library: Path, short_tmp: Path) -> Iterator[ServerFactory]:
    """Return a function that starts servers on that library."""
    with server_farm(other_library, short_tmp) as factory:
        yield factory


def test_dma_goes_both_ways_by_file_and_by_message(other: ServerFactory, other_library: Path) -> None:
    """And after a region was unmapped and mapped again: which callback is which was told apart rightly."""
    with other("--fill", "7").connect() as device:
        device.dma_map(0x10000, 64 * KIB)
        for _ in range(2):
            regions = [device.dma_map(RAM, MIB), device.dma_map(MESSAGES, MIB, shared=False)]
            driver = Driver(device)
            # Upstream's is out of step when a request crosses its own, and a driver polls.
            for address in (RAM,) if str(other_library) == REAL else (RAM, MESSAGES):
                driver.memory(address, 5000)[:] = b"guest" * 1000
                assert driver.one(Op.TO_DEVICE, address=address, offset=64, length=5000).status is Status.DONE
                assert device.region_read(2, 64, 5000) == b"guest" * 1000
                assert driver.one(Op.TO_GUEST, address=address, offset=0, length=64).status is Status.DONE
                assert bytes(driver.memory(address, 64)) == device.region_read(2, 0, 64)
            for region in regions:
                device.dma_unmap(region)
            assert driver.one(Op.TO_GUEST, address=RAM, offset=0, length=64).status is not Status.DONE
        assert device.dma.write_requests or str(other_library) == REAL


def test_dma_is_logged(other: ServerFactory) -> None:
    with other("--fill", "7").connect() as device:
        device.dma_map(0x10000, 64 * KIB)
        device.dma_map(RAM, MIB)
        driver = Driver(device)
        assert device.migration.dma_logging_start([(RAM, MIB)]) == 4096
        device.migration.dma_logging_report(RAM, MIB)
        assert driver.one(Op.TO_GUEST, address=RAM + 5 * 4096, offset=0, length=64).status is Status.DONE
        dirty = int.from_bytes(device.migration.dma_logging_report(RAM, MIB), "little")
        assert dirty == 1 << 5
        device.migration.dma_logging_stop()


@pytest.mark.parametrize("memory", ["64K", "4M"])
def test_the_state_moves(other: ServerFactory, memory: str) -> None:
    """In slices that one recv() takes, and with replies that may be padded."""
    source, destination = other("--fill", "7", memory=memory), other(memory=memory)
    with source.connect() as one, destination.connect() as two:
        assert not one.version.precopy_info
        assert one.max_data_xfer_size <= 128 * KIB
        before = contents(one)  # upstream's answers nothing but DEVICE_FEATURE of a stopped device
        Migrator(one, two, ClientOptions(timeout_seconds=PATIENCE_SECONDS)).run()
        assert two.migration.get_state() is DeviceState.RUNNING
        assert contents(two) == before


def contents(device: VfioUserDevice) -> bytes:
    return bytes(device.region_read(2, 0, device.region_info(2).size_bytes))


def test_what_is_missing_is_said_once_at_start(other: ServerFactory) -> None:
    server: RunningServer = other()
    lines = [line for line in server.log().splitlines() if "is not vfu-dev's libvfio-user" in line]
    assert len(lines) == 1
    for missing in ("MIG_GET_PRECOPY_INFO", "MIG_DATA_SIZE", "P2P", "DMA log"):
        assert missing in lines[0]
