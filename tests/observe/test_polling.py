"""Whoever watches a migration takes no part in it: asking makes the server do nothing to memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from countedwork import COUNTS_VARIABLE, PAGES, make_counts, read_counts
from observekit import Web
from serverkit import RunningServer, ServerFactory, wait_until

from vfu_dev.bench.peers import free_port
from vfu_dev.client import VfioUserDevice
from vfu_dev.uapi import DeviceState as S

BAR2, PAGE = 2, 4096
POLLERS = 10
ROUNDS = 3  # that each poller makes in each phase, at least
COMMANDS = ("status", "figures", "faults", "load-status")
PATHS = ("/metrics", "/api/status?after=0")

Counts = dict[str, int]


class Counted:
    """One server that counts its work on pages, and whoever polls it."""

    def __init__(
        self, serve: ServerFactory, counts: Path, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_counts(counts)
        monkeypatch.setenv(COUNTS_VARIABLE, str(counts))
        self.web = Web(free_port())
        spec = f"{Path(__file__).parent / 'countedwork.py'}:{device}"
        self.server: RunningServer = serve(
            "--device", spec, "--metrics-port", str(self.web.port), memory=None
        )
        self._path = counts
        self.rounds = [0] * POLLERS
        wait_until(self.web.answers, "the metrics port")

    def counts(self) -> Counts:
        """Return the work so far, what the last message or change of state caused included."""
        with self.server.control() as control:  # accepted in a later turn of the loop
            control.command("faults")
        return read_counts(self._path)

    def poll(self, number: int, stop: threading.Event) -> None:
        """Ask everything that only asks, until told to stop."""
        with self.server.control() as control:
            while not stop.is_set():
                for command in COMMANDS:
                    control.command(command)
                for path in PATHS:
                    assert self.web.get(path)[0] == 200
                self.rounds[number] += 1


@contextmanager
def polled(*servers: Counted) -> Iterator[Callable[[], None]]:
    """Poll `servers` with POLLERS threads; yields what waits until each has asked everything a few times."""
    stop = threading.Event()
    with ThreadPoolExecutor(POLLERS * len(servers)) as pool:
        polls = [pool.submit(server.poll, number, stop) for server in servers for number in range(POLLERS)]

        def wait() -> None:
            goals = [[rounds + ROUNDS for rounds in server.rounds] for server in servers]

            def reached() -> bool:
                for poll in polls:
                    if poll.done():
                        poll.result()  # raises what ended it
                return not np.any(np.less([server.rounds for server in servers], goals))

            wait_until(reached, "every poller has asked everything")

        try:
            yield wait
        finally:
            stop.set()


def move(source: Counted, target: Counted, mapped: bool, phase: Callable[[], None]) -> dict[str, Counts]:
    """Move a device; call `phase` wherever somebody may look. Return the work done by the end of each."""
    work: dict[str, Counts] = {}

    def done(name: str, server: Counted = source) -> None:
        phase()
        work[name] = server.counts()

    with source.server.connect() as device, target.server.connect() as other:
        write = writer(device, mapped)
        write(range(PAGES))
        done("RUNNING")
        device.migration.set_state(S.PRE_COPY)
        done("PRE_COPY, all to be read")
        data = device.migration.read(PAGES // 2 * PAGE)
        for _ in range(2):  # the same pages: whoever looks in between sees them twice
            write(range(0, PAGES, 3))
            done("PRE_COPY, written")
        data += read_all(device)
        write(range(5, 15))
        done("PRE_COPY, read and written")
        device.migration.set_state(S.STOP_COPY)
        done("STOP_COPY, to be read")
        data += read_all(device)
        done("STOP_COPY, read")
        device.migration.set_state(S.STOP)
        phase()
        wait_until(lambda: source.server.status()["save"]["audited"] is True, "the audit")
        done("STOP")
        other.migration.set_state(S.RESUMING)
        done("RESUMING, nothing", target)
        half = len(data) // 2
        other.migration.write(data[:half])
        done("RESUMING, half", target)
        other.migration.write(data[half:])
        done("RESUMING, all", target)
        other.migration.set_state(S.STOP)
        done("resumed", target)
        here, there = device.region_read(BAR2, 0, PAGES * PAGE), other.region_read(BAR2, 0, PAGES * PAGE)
        assert bytes(here) == bytes(there)
    return work


def writer(device: VfioUserDevice, mapped: bool) -> Callable[[range], None]:
    """Return what writes other data to pages with each call."""
    chance = np.random.default_rng(1)
    area = device.map_region(BAR2).areas[0][1] if mapped else None

    def write(pages: range) -> None:
        for page in pages:
            # In the trapped memory some are zeros; there nothing depends on how long a scan takes.
            data = bytes(PAGE) if page % 7 == 6 and not mapped else chance.bytes(PAGE)
            if area is None:
                device.region_write(BAR2, page * PAGE, data)
            else:
                area[page * PAGE : (page + 1) * PAGE] = data

    return write


def read_all(device: VfioUserDevice) -> bytes:
    """Read until nothing comes."""
    return b"".join(iter(lambda: bytes(device.migration.read(1 << 20)), b""))


@pytest.mark.parametrize("access", ["Trapped", "Mapped"])
def test_asking_makes_no_work(
    access: str, serve: ServerFactory, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages hashed, classified, copied and compared: as many with ten pollers of everything as with none."""
    found = []
    for kind in ("left alone", "polled"):
        source, target = (
            Counted(serve, short_tmp / f"{kind} {end}", access, monkeypatch) for end in ("source", "target")
        )
        if kind == "left alone":
            found.append(move(source, target, access == "Mapped", lambda: None))
        else:
            with polled(source, target) as wait:
                found.append(move(source, target, access == "Mapped", wait))
    alone, watched = found
    assert watched == alone
    # It counts: all was hashed once to be sent and once by the audit, and so on.
    total = alone["STOP"]
    assert total["hashed"] + total["gathered"] >= 2 * PAGES
    assert total["compared" if access == "Mapped" else "classified"] > PAGES
    assert total["scanned"] > 0
    assert alone["resumed"]["scattered"] >= PAGES // 2
    assert alone["STOP_COPY, read"]["hashed"] < total["hashed"]
