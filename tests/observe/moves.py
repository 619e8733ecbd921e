"""Migrations with a steady write load, from a real server to a real server, without QEMU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from serverkit import PATIENCE_SECONDS, RunningServer, wait_until

from vfu_dev.client.connection import Call
from vfu_dev.client.migrator import ClientOptions, ClientProgress, MigrationError, Migrator
from vfu_dev.uapi import VFIO_PCI_BAR2_REGION_INDEX

PAGE_BYTES = 4096
MEMORY = "32M"
MEMORY_PAGES = 8192


@dataclass(frozen=True)
class Load:
    """A guest that writes `bytes_per_second` of pages over a link of `bandwidth`, or one without a limit."""

    bytes_per_second: int
    bandwidth: int | None
    downtime_limit_seconds: float
    timeout_seconds: float


# What is dirty after the first pass fits at once: a stop of some 0.3 s, long against the machine's hiccups.
CONVERGES = Load(6 << 20, 16 << 20, 0.6, PATIENCE_SECONDS)
# Half of what the link carries: a dozen passes, each half as long as the one before.
CONVERGES_SLOWLY = Load(8 << 20, 16 << 20, 0.06, PATIENCE_SECONDS)
# Dirties four times what the link carries: what is dirty after a pass never fits. It ends with its server.
DOES_NOT_CONVERGE = Load(32 << 20, 8 << 20, 0.1, 2 * PATIENCE_SECONDS)


def move(source: RunningServer, destination: RunningServer, load: Load) -> ClientProgress:
    """Move the device while it is written to; both servers have seen their client go then.

    One connection, one thread: the writes that are due go out before each read.

    Raises: MigrationError: it did not end in time.
    """
    random = Random(1)
    with source.connect() as ours, destination.connect() as theirs:
        options = ClientOptions(
            downtime_limit_seconds=load.downtime_limit_seconds,
            max_bandwidth=load.bandwidth,
            max_passes=None,
            timeout_seconds=load.timeout_seconds,
        )
        migrator = Migrator(ours, theirs, options)
        read, began, written = migrator.source.submit_read, time.monotonic(), 0

        def write_then_read(buffer: memoryview) -> Call:
            nonlocal written
            due = int((time.monotonic() - began) * load.bytes_per_second / PAGE_BYTES)
            while written < due and migrator.progress.phase == "pre-copy":
                page = random.randrange(MEMORY_PAGES)
                ours.region_write(
                    VFIO_PCI_BAR2_REGION_INDEX, page * PAGE_BYTES, random.randbytes(8), posted=True
                )
                written += 1
            return read(buffer)

        migrator.source.submit_read = write_then_read  # type: ignore[method-assign]
        progress = migrator.run()
    for server in (source, destination):
        wait_without_client(server)
    return progress


def wait_without_client(server: RunningServer) -> None:
    """Wait for the end of the connection: a save is counted with it, and the last sample was taken before."""
    wait_until(lambda: not server.status()["connected"], "the server drops its client")


@contextmanager
def moving(source: RunningServer, destination: RunningServer, load: Load) -> Iterator[threading.Event]:
    """Have a move under way, in a thread; ends with it. The event says that it is over."""
    over = threading.Event()
    errors: list[Exception] = []

    def run() -> None:
        try:
            move(source, destination, load)
        except MigrationError as error:
            errors.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield over
    finally:
        source.stop()  # a migration that does not converge ends with its server
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
