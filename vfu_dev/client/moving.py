"""A client's load, alone or while the device that it writes to is migrated."""

from __future__ import annotations

import time

from vfu_dev.client.commanded import POLL_SECONDS, LoadReporter
from vfu_dev.client.device import VfioUserDevice
from vfu_dev.client.migrator import ClientOptions, ClientProgress, MigrationError, Migrator
from vfu_dev.client.stop import Stop, deadline_of
from vfu_dev.client.workload import ClientWorkload


def keep_writing(load: ClientWorkload, seconds: float | None, stop: Stop, reporter: LoadReporter) -> None:
    """Let the load go on for the given time, or until asked to stop.

    Raises: what ended the load, if something did.
    """
    deadline = deadline_of(seconds)
    while not stop.asked and time.monotonic() < deadline:
        stop.wait(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        load.check()
        reporter(load.figures())
    load.check()


def migrate(
    load: ClientWorkload,
    source: VfioUserDevice,
    destination: VfioUserDevice,
    options: ClientOptions,
    stop: Stop,
    reporter: LoadReporter,
) -> ClientProgress:
    """Move the device from `source` to `destination` under its load, which goes on where the device runs.

    Raises: MigrationError: it failed or was interrupted; the load goes on at the source.
    """

    def progress(state: ClientProgress) -> None:
        # As a guest's CPUs do: writing ends before the device is stopped.
        if state.phase == "stop-copy":
            load.pause()
        load.check()
        if stop.asked and state.phase in ("setup", "pre-copy"):
            raise KeyboardInterrupt
        reporter(load.figures())

    migrator = Migrator(source, destination, options, reporter=progress)
    try:
        migrator.run()
    except KeyboardInterrupt:
        load.go_on()
        raise MigrationError(migrator.progress.phase, "interrupted") from None
    except BaseException:
        load.go_on()
        raise
    load.go_on(destination)
    return migrator.progress
