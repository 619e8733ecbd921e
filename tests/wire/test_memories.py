"""Several memories over the wire, one of them mapped by the client; new initial data in the middle."""

from __future__ import annotations

import os
import threading

import numpy as np
import numpy.typing as npt
import pytest
from serverkit import ANY_DOWNTIME, PATIENCE_SECONDS, ServerFactory, wait_until
from streamkit import read_all, resume

from vfu_dev import uapi
from vfu_dev.client import ClientCommandError, ClientOptions, Migrator, VfioUserDevice
from vfu_dev.device.reference.layout import REGISTERS
from vfu_dev.errors import AccessError
from vfu_dev.uapi import DeviceState

S = DeviceState
BAR0, BAR2, BAR4 = 0, 2, 4
REG_REINIT, REG_WINDOW = REGISTERS["reinit"].offset, REGISTERS["window"].offset
MIB = 1 << 20


def promised(device: VfioUserDevice) -> tuple[int, int, int]:
    """Return initial, dirty and the rest that only STOP_COPY has."""
    info = device.migration.precopy_info()
    return (
        info.initial_bytes,
        info.dirty_bytes,
        device.migration.data_size() - info.initial_bytes - info.dirty_bytes,
    )


def words_of(device: VfioUserDevice, index: int) -> npt.NDArray[np.uint64]:
    """Return the mapped region as the guest's CPU has it; unmapped when the array goes."""
    return np.frombuffer(device.map_region(index).areas[0][1], dtype=np.uint64)


def test_what_a_client_writes_to_its_mapping_moves(serve: ServerFactory) -> None:
    """No message tells the server of a write; sizes and stream have it all the same, at every step."""
    source, destination = serve("--fill", "3", "--access", "mmap"), serve("--access", "mmap")
    with source.connect() as device, destination.connect() as other, device.map_region(BAR2) as mapping:
        memory = mapping.areas[0][1]
        migration = device.migration
        migration.set_state(S.PRE_COPY)
        initial, dirty, rest = promised(device)
        assert initial > MIB
        assert dirty == 0
        stream = read_all(device, MIB)
        assert len(stream) == initial
        assert promised(device) == (0, 0, rest)
        for page in (1, 100, 101):
            memory[page * 4096 + 9] ^= 0xFF
        device.region_write(BAR2, 200 * 4096, b"by message")
        initial, dirty, _ = promised(device)
        assert initial == 0
        assert 4 * 4096 < dirty < 5 * 4096
        more = read_all(device, 1000)
        assert len(more) == dirty
        memory[255 * 4096 : 256 * 4096] = os.urandom(4096)
        length = migration.data_size()
        migration.set_state(S.STOP_COPY)
        last = read_all(device, MIB)
        assert len(last) == length
        resume(other, stream + more + last)
        with other.map_region(BAR2) as there:
            assert there.areas[0][1][:MIB] == memory[:MIB]
        saved, resumed = source.status()["save"], destination.status()["resume"]
        assert saved["digest"] == resumed["digest"]
        assert source.status()["counters"]["region_writes"] == 1


def test_a_trapped_region_cannot_be_mapped(serve: ServerFactory) -> None:
    with serve().connect() as device, pytest.raises(AccessError, match="cannot be mapped"):
        device.map_region(BAR2)


def test_access_modes_mix(serve: ServerFactory) -> None:
    """How a memory is reached is no part of its state: mapped there, trapped here, and the other way."""
    mapped, trapped = serve("--fill", "3", "--access", "mmap"), serve("--fill", "4")
    for source, destination in ((mapped, trapped), (trapped, mapped)):
        with source.connect() as device, destination.connect() as other:
            device.region_write(BAR2, 5000, os.urandom(100))
            assert Migrator(device, other).run().stop_copy_bytes > 0
        assert source.status()["save"]["digest"] == destination.status()["resume"]["digest"]


MEMORIES = (
    "--memory", "vram=16M,bar=4,access=mmap",
    "--memory", "table=192K,page-size=64K",
    "--memory", "hidden=5G",
)  # fmt: skip


def test_many_memories_of_different_kinds_move_together(serve: ServerFactory) -> None:
    """Trapped and mapped, with other page sizes, without a BAR, larger than 4 GiB, under a writer."""
    source, destination = serve("--fill", "0", *MEMORIES), serve(*MEMORIES)
    with source.connect() as device, destination.connect() as other:
        names = [memory["name"] for memory in source.status()["memories"]]
        assert names == ["memory", "vram", "table", "hidden"]
        words = words_of(device, BAR4)
        words[:] = np.arange(len(words)) + 1
        device.region_write(BAR2, 0, os.urandom(MIB))
        stop = threading.Event()

        def write() -> None:
            chance = np.random.default_rng(2)
            while not stop.wait(0.001):
                words[chance.integers(0, len(words), 20)] = chance.integers(1, 1 << 60, 20, dtype=np.uint64)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            device.migration.set_state(S.PRE_COPY)
            # Not "until nothing comes": on a quick machine there is always something more.
            parts: list[bytes] = []
            while sum(map(len, parts)) < 24 * MIB:  # the first 17 MiB, and what the writer made of them
                parts.append(device.migration.read(MIB))
        finally:
            stop.set()
            writer.join()
        device.migration.set_state(S.STOP_COPY)
        parts.append(read_all(device, MIB))
        resume(other, b"".join(parts))
        assert (words_of(other, BAR4) == words).all()
        assert other.region_read(BAR2, 0, MIB) == device.region_read(BAR2, 0, MIB)
        device.migration.set_state(S.STOP)
        saved = source.audited()["save"]
        assert saved["digest"] == destination.status()["resume"]["digest"]
        assert (saved["status"], saved["audited"]) == ("completed", True)
        assert saved["pages_resent"] > 0


def test_a_memory_larger_than_its_bar_is_seen_through_a_window(serve: ServerFactory) -> None:
    """6 GiB behind a BAR of 64 KiB: a register moves the window, and both migrate."""
    options = ("--memory", "big=6G,bar=4,window=64K")
    source, destination = serve(*options), serve(*options)
    far = (5 << 30) + 8192
    with source.connect() as device, destination.connect() as other:
        assert device.region_info(BAR4).size_bytes == 65536
        device.region_write(BAR4, 16, b"near")
        device.region_write(BAR0, REG_WINDOW, far.to_bytes(8, "little"))
        device.region_write(BAR4, 16, b"far away")
        progress = Migrator(device, other, ANY_DOWNTIME).run()
        # 6 GiB of which two pages were touched: some hundred bytes for each GiB
        assert progress.transferred_bytes < 64 * 1024
        assert other.region_read(BAR4, 16, 8) == b"far away"
        other.region_write(BAR0, REG_WINDOW, bytes(8))
        assert other.region_read(BAR4, 16, 4) == b"near"


@pytest.mark.parametrize("opted_in", [True, False])
def test_new_initial_data_in_pre_copy(serve: ServerFactory, opted_in: bool) -> None:
    """A client that opted in is told once and sees initial_bytes; for the other it is dirty_bytes."""
    source, destination = serve("--fill", "9"), serve()
    with source.connect() as device, destination.connect() as other:
        migration = device.migration
        if opted_in:
            migration.enable_precopy_info_v2()
        migration.set_state(S.PRE_COPY)
        stream = read_all(device, MIB)
        assert promised(device)[:2] == (0, 0)
        device.region_write(BAR2, 128 * 4096, b"dirty, no more")
        device.region_write(BAR0, REG_REINIT, (64).to_bytes(4, "little"))
        info = migration.precopy_info()
        assert info.reinit is opted_in
        assert (info.initial_bytes > 64 * 4096) is opted_in
        assert (info.initial_bytes == 0) is not opted_in
        assert (info.dirty_bytes > 64 * 4096) is not opted_in
        assert not migration.precopy_info().reinit  # "since the last reply"
        first = migration.read(max(1, info.initial_bytes))
        if opted_in:
            assert promised(device)[0] == 0
            assert promised(device)[1] == info.dirty_bytes
        stream += first + read_all(device, MIB)
        migration.set_state(S.STOP_COPY)
        resume(other, stream + read_all(device, MIB))
        assert source.status()["save"]["digest"] == destination.status()["resume"]["digest"]
        assert source.status()["save"]["reinits"] == 1


def test_the_opt_in_ends_with_the_connection(serve: ServerFactory) -> None:
    server = serve("--fill", "9")
    with server.connect() as device:
        device.migration.enable_precopy_info_v2()
    with server.connect() as device:
        device.migration.set_state(S.PRE_COPY)
        read_all(device, MIB)
        device.region_write(BAR0, REG_REINIT, (64).to_bytes(4, "little"))
        info = device.migration.precopy_info()
        assert (info.initial_bytes, info.flags) == (0, 0)


def test_each_query_scans_mapped_memory(serve: ServerFactory) -> None:
    """256 MiB under a migration that asks all the time: 20 scans, which see every page between them.

    How long a register access waits for one of them is a figure of `vfu-dev bench precopy`.
    """
    source = serve("--access", "mmap", memory="256M")
    with source.connect() as device:
        words_of(device, BAR2)[:] = 1
        device.migration.set_state(S.PRE_COPY)
        read_all(device, MIB)

        def scans() -> dict[str, int]:
            return dict(source.status()["memories"][0]["scans"])

        before = scans()
        for _ in range(20):
            device.migration.data_size()
        assert scans()["count"] >= before["count"] + 20
        wait_until(
            lambda: device.migration.data_size() and scans()["pages"] >= before["pages"] + 65536,
            "each page has had its turn",
        )
        device.migration.set_state(S.RUNNING)


@pytest.mark.parametrize(
    "options",
    [
        ("--memory", "x=1M,bar=3"),
        ("--memory", "x=1M,bar=4", "--memory", "y=1M,bar=4"),
        ("--memory", "x=1M,colour=red"),
        ("--memory", "x=1M,access=psychic"),
        ("--memory", "x=lots"),
        ("--memory", "memory=1M"),
        ("--memory", "big=6G,bar=4,window=64K,access=mmap"),
    ],
)
def test_impossible_memories_are_refused_in_words(serve: ServerFactory, options: tuple[str, ...]) -> None:
    with pytest.raises(BaseException, match=r"memory|BAR|window|x=|unique"):
        serve(*options)


def test_reinit_outside_pre_copy_is_an_ordinary_write(serve: ServerFactory) -> None:
    with serve("--fill", "9").connect() as device:
        device.region_write(BAR0, REG_REINIT, (1 << 31).to_bytes(4, "little"))
        assert device.migration.probe(uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2)
        with pytest.raises(ClientCommandError):
            device.migration.precopy_info()


def test_options_and_wait(serve: ServerFactory) -> None:
    """An idle mapped device converges by QEMU's rule, whatever the budget of a scan."""
    source, destination = serve("--fill", "1", "--access", "mmap", memory="64M"), serve(memory="64M")
    with source.connect() as device, destination.connect() as other:
        progress = Migrator(device, other, ClientOptions(timeout_seconds=PATIENCE_SECONDS)).run()
        assert progress.initial_bytes > 64 * MIB
    wait_until(lambda: destination.status()["resume"]["status"] == "completed", "the load is complete")
