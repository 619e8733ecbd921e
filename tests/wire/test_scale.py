"""What memory costs: a server has its device's written pages resident, some bytes for each page, and a
constant; whatever the size of the memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from serverkit import ANY_DOWNTIME_ARGUMENTS, RunningServer, ServerFactory, run_vfu_dev

from vfu_dev.uapi import DeviceState

MIB = 1 << 20
# An interpreter with numpy, and the buffers of a migration.
CONSTANT = 80 * MIB
BAR2 = 2


def moved(source: RunningServer, destination: RunningServer) -> tuple[int, int]:
    """Migrate device to device; return the most memory that each server had resident."""
    line = ("migrate", source.socket, destination.socket, "--max-bandwidth", "0", *ANY_DOWNTIME_ARGUMENTS)
    done = run_vfu_dev(*line)
    assert done.returncode == 0, done.stderr
    for server in (source, destination):
        with server.control() as control:
            control.command("digest")  # of all memory, as it is
    first, second = source.audited(), destination.status()
    assert first["save"]["status"] == second["resume"]["status"] == "completed"
    assert first["save"]["digest"] == second["resume"]["digest"]
    return first["peak_resident_bytes"], second["peak_resident_bytes"]


@pytest.mark.parametrize("access", ["trap", "mmap"])
def test_memory_is_the_state_and_a_constant(access: str, serve: ServerFactory) -> None:
    """Of a full memory, four times as large: the difference is the state's."""
    small, large = 16 * MIB, 64 * MIB
    peaks = {}
    for size in (small, large):
        options = ("--access", access)
        source = serve(*options, "--fill", "5", memory=str(size))
        peaks[size] = moved(source, serve(*options, memory=str(size)))
        assert source.status()["memories"][0]["written_bytes"] == size
    for side in (0, 1):
        grown = peaks[large][side] - peaks[small][side]
        # Page map, hashes and what else is kept of each page: 29 of its 4096 bytes. Buffers differ a little.
        assert 0.9 < grown / (large - small) < 1.15
        assert small < peaks[small][side] < small + CONSTANT


def anonymous_bytes(pid: int) -> int:
    """Return what a process holds of memory that is no file's; a client's mapped memory is a file's."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10


def test_a_migration_of_mapped_memory_keeps_no_copy_of_it(serve: ServerFactory) -> None:
    """256 MiB are sent in PRE_COPY and scanned: the server holds at most a sixteenth more."""
    size = 256 * MIB
    source = serve("--access", "mmap", "--fill", "5", memory=str(size))
    with source.connect() as device:
        before = anonymous_bytes(source.process.pid)
        device.migration.set_state(DeviceState.PRE_COPY)
        sent = 0
        while stored := len(device.migration.read(MIB)):
            sent += stored
        added = anonymous_bytes(source.process.pid) - before
        assert sent > size
        # Fingerprints, 16 bytes of each page, have to be there; else nothing of the session was seen.
        assert size // 4096 * 16 < added < size // 16
        device.migration.set_state(DeviceState.RUNNING)


@pytest.mark.parametrize("access", ["trap", "mmap"])
def test_a_tebibyte_that_nobody_touched_costs_nothing(access: str, serve: ServerFactory) -> None:
    """Not when it is served, not when it is migrated, and not when its digest is taken."""
    source, destination = (serve("--access", access, memory="1T") for _ in range(2))
    for peak in moved(source, destination):
        assert peak < 100 * MIB
    assert (
        source.status()["memories"][0] | {"size_bytes": 1 << 40, "written_bytes": 0}
        == (source.status()["memories"][0])
    )


def test_a_sparse_memory_costs_what_was_written(serve: ServerFactory) -> None:
    """Of 16 GiB a page in each 256 MiB arrives, and only those."""
    source, destination = (serve(memory="16G") for _ in range(2))
    places = [number << 28 for number in range(64)]
    with source.connect() as device:
        for place in places:
            device.region_write(BAR2, place, (place + 1).to_bytes(8, "little"))
    peaks = moved(source, destination)
    save = source.status()["save"]
    assert save["pages_sent"] == len(places)
    assert save["precopy_bytes"] + save["stop_copy_bytes"] < 2 * len(places) * 4096
    # Of the 13 bytes for each page, all may be resident: huge pages have 2 MiB of them.
    assert max(peaks) < CONSTANT + 13 * (16 << 30) // 4096
    with destination.connect() as device:
        for place in places:
            assert device.region_read(BAR2, place, 8) == (place + 1).to_bytes(8, "little")
