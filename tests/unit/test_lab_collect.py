"""What is collected at the end of a move: QEMU says how it ended before it takes the devices out of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_metrics_scrape import example

from vfu_dev.errors import LabError
from vfu_dev.figures import Figures, Sample
from vfu_dev.lab.host import Fetched, fetch_all
from vfu_dev.lab.observer import ObservedMove
from vfu_dev.lab.result import MigrationResult
from vfu_dev.vm.monitor import Monitor
from vfu_dev.vm.servers import ControlledServer

DOWNTIME_SECONDS = 0.375


class Leaving(ControlledServer):
    """A server whose device goes on to its next state behind each status.

    Its figures have a sample of that state, and a downtime once the device is out of the migration.

    Attributes: asked: the commands that it got.
    """

    def __init__(self, name: str, *states: str) -> None:
        super().__init__(name, Path("nowhere"))
        self.states = list(states)
        self.asked: list[str] = []

    async def command(self, name: str, **arguments: Any) -> Any:
        """Answer as `vfu-dev serve` does."""
        self.asked.append(name)
        state = self.states[0]
        if name == "status":
            if len(self.states) > 1:
                del self.states[0]
            return {"state": state}
        if name == "faults":
            return {"injected": {}}
        assert name == "figures"
        snapshot = replace(
            example(), state=state, last_downtime_seconds=None if "COPY" in state else DOWNTIME_SECONDS
        )
        sample = Sample(0.0, state, None, None, None, 0, None, None, None, 0)
        return Figures(snapshot, arguments["after"] + 1, False, [sample]).as_dict()


class Silent(Leaving):
    """A server without a control socket."""

    has_control = False

    async def command(self, name: str, **arguments: Any) -> Any:
        """Fail."""
        raise LabError("no control socket")


class Finishing(Monitor):
    """A QEMU whose VM goes on to its next run state behind each answer. Attributes: states."""

    def __init__(self, *states: str) -> None:
        super().__init__("source", Path("nowhere"))
        self.states = list(states)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Answer as QEMU does when a migration has failed."""
        if command == "query-status":
            return {"status": self.states.pop(0) if len(self.states) > 1 else self.states[0]}
        return [] if command == "query-migrate-capabilities" else {"status": "failed"}


class Observed:
    """A side."""

    def __init__(self, qemu: Monitor, servers: Sequence[Leaving]) -> None:
        self.qemu = qemu
        self.servers = servers

    async def fetch_figures(self) -> list[Fetched]:
        """Return what each server measured."""
        return await fetch_all(self.servers)


class Observing(ObservedMove):
    """Observes a migration that was last sampled with `status`; None: never."""

    timeout_seconds = 0.0

    def __init__(self, status: str | None, source: Observed, destination: Observed) -> None:
        super().__init__(len(source.servers), None)
        self.source, self.destination = source, destination
        if status is not None:
            self.samples = [{"status": status, "qemu": {}}]

    @property
    def parameters(self) -> Mapping[str, Any]:
        """None is set."""
        return {}

    @property
    def downtime_limit_ms(self) -> int:
        """QEMU's default."""
        return 300


def collected(
    status: str | None,
    source: Sequence[Leaving],
    destination: Sequence[Leaving],
    qemu: Monitor | None = None,
) -> MigrationResult:
    """Return what is collected of it. Without `qemu`, the source's answers nothing any more."""
    gone = Monitor("gone", Path("nowhere"))
    observing = Observing(status, Observed(qemu or gone, source), Observed(gone, destination))
    result = MigrationResult()
    asyncio.run(observing.collect(result))
    assert result.problems == []
    return result


@pytest.mark.parametrize(
    ("status", "states"),
    [
        ("completed", ("STOP_COPY", "STOP_COPY", "STOP")),
        ("failed", ("PRE_COPY", "PRE_COPY", "RUNNING")),
        ("cancelled", ("PRE_COPY_P2P", "PRE_COPY", "RUNNING")),
    ],
)
def test_figures_are_of_devices_that_have_left_the_migration(status: str, states: tuple[str, ...]) -> None:
    """Of two, the second one leaves last: status and figures of both are from after that."""
    source = [Leaving("first", states[-1]), Leaving("second", *states)]
    result = collected(status, source, [Leaving("third", "RUNNING"), Leaving("fourth", "RUNNING")])
    assert [server.asked for server in source] == [
        ["status", "faults", "figures"],
        ["status", "status", "status", "faults", "figures"],
    ]
    assert [device.name for device in result.devices] == ["vfu0", "vfu1"]
    for device in result.devices:
        assert device.state_source == states[-1]
        assert device.downtime_seconds == DOWNTIME_SECONDS
        (row,) = device.samples_source["rows"]
        assert row[1] == states[-1]


@pytest.mark.parametrize("status", ["active", None])
def test_a_migration_that_has_not_ended_is_not_waited_for(status: str | None) -> None:
    """Its device stays in PRE_COPY for as long as it takes."""
    source = Leaving("source", "PRE_COPY", "RUNNING")
    (device,) = collected(status, [source], [Leaving("destination", "RESUMING")]).devices
    assert source.asked.count("status") == 1
    assert device.state_source == "PRE_COPY"


def test_a_destination_that_migrates_on_is_not_waited_for() -> None:
    """Whoever is watched may begin the next migration at once."""
    destination = Leaving("destination", "PRE_COPY", "RUNNING")
    (device,) = collected("completed", [Leaving("source", "STOP")], [destination]).devices
    assert destination.asked.count("status") == 1
    assert device.state_destination == "PRE_COPY"


def test_a_device_without_control_leaves_the_others_their_figures() -> None:
    """Figures go by the device's number, not by how many servers answer."""
    silent, source = Silent("silent", "STOP"), Leaving("source", "STOP_COPY", "STOP")
    (device,) = collected(
        "completed", [silent, source], [Leaving("a", "RUNNING"), Leaving("b", "RUNNING")]
    ).devices
    assert device.name == "vfu1"
    assert [row[1] for row in device.samples_source["rows"]] == ["STOP"]


def test_a_device_that_does_not_leave_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait has an end; the judge finds the state that is reported."""
    monkeypatch.setattr("vfu_dev.lab.observer.AUDIT_SECONDS", 0.0)
    source = Leaving("source", "PRE_COPY", "PRE_COPY", "RUNNING")
    (device,) = collected("failed", [source], [Leaving("destination", "RESUMING")]).devices
    assert device.state_source == "PRE_COPY"
    assert device.downtime_seconds is None


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_the_vm_is_as_qemu_leaves_it(status: str) -> None:
    """QEMU says the end while it still keeps the VM stopped; the source's server may be gone, too."""
    after = {"completed": "postmigrate", "failed": "running"}[status]
    qemu = Finishing("finish-migrate", "finish-migrate", after)
    result = collected(status, [Silent("source")], [Silent("destination")], qemu)
    assert result.qemu.run_state_source == after


def test_a_vm_that_a_migration_under_way_has_stopped_is_not_waited_for() -> None:
    """Whoever gave the wait up learns where it stood."""
    qemu = Finishing("finish-migrate", "postmigrate")
    result = collected("device", [Silent("source")], [Silent("destination")], qemu)
    assert result.qemu.run_state_source == "finish-migrate"
