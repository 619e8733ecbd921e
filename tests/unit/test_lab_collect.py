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
from vfu_dev.lab.observer import Observer
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


class Ended:
    """A side whose QEMU answers nothing any more."""

    def __init__(self, name: str, servers: Sequence[Leaving]) -> None:
        self.qemu = Monitor(name, Path("nowhere"))
        self.servers = servers

    async def fetch_figures(self) -> list[Fetched]:
        """Return what each server measured."""
        return await fetch_all(self.servers)


class Observing(Observer):
    """Observes a migration that was last sampled with `status`; None: never."""

    timeout_seconds = 0.0

    def __init__(self, status: str | None, source: Sequence[Leaving], destination: Sequence[Leaving]) -> None:
        super().__init__(len(source), None)
        self.source, self.destination = Ended("source", source), Ended("destination", destination)
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
    status: str | None, source: Sequence[Leaving], destination: Sequence[Leaving]
) -> MigrationResult:
    """Return what is collected of it."""
    result = MigrationResult()
    asyncio.run(Observing(status, source, destination).collect(result))
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
