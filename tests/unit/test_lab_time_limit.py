"""The time limit of a move whose QEMU sends more events than are read: answers come behind all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from qmpkit import commands, event_of, greeting, line_of

from vfu_dev.lab.host import Fetched
from vfu_dev.lab.observer import ObservedMove, TimeLimitError
from vfu_dev.vm.monitor import PASS, Monitor
from vfu_dev.vm.servers import ControlledServer


class SpinningQemu:
    """A QMP server that makes passes: what it answers stands behind them until the migration is cancelled.

    Args: answers_cancel: whether it answers that at once; else behind passes, with the next answer.
    Attributes: asked: the commands that it got. late: how many answers stood behind passes.
    """

    def __init__(self, answers_cancel: bool = True) -> None:
        self.answers_cancel = answers_cancel
        self.asked: list[str] = []
        self.late = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        behind: list[dict[str, Any]] = []
        writer.write(line_of(greeting()))
        async for command in commands(reader):
            self.asked.append(command["execute"])
            cancelled = "migrate_cancel" in self.asked
            status = {"status": "cancelled" if cancelled else "active"}
            behind.append({"return": status, "id": command["id"]})
            held = command["execute"] == "migrate_cancel" and not self.answers_cancel
            if not held and (command["execute"] != "query-migrate" or cancelled):
                self.late += len(behind) - 1
                writer.writelines(map(line_of, behind))
                behind.clear()
                continue
            for number in range(100):
                writer.write(line_of(event_of(PASS, **{"pass": number})))
        writer.close()


class Source:
    """A side that has a monitor, and no devices."""

    servers: Sequence[ControlledServer] = ()

    def __init__(self, qemu: Monitor) -> None:
        self.qemu = qemu

    async def fetch_figures(self) -> list[Fetched]:
        """Return nothing: there are no devices."""
        return []


class Spinning(ObservedMove):
    """Observes it."""

    timeout_seconds = 0.05

    def __init__(self, qemu: Monitor) -> None:
        super().__init__(0, None)
        self.source = self.destination = Source(qemu)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """None is set."""
        return {}

    @property
    def downtime_limit_ms(self) -> int:
        """QEMU's default."""
        return 300


@contextlib.asynccontextmanager
async def watching(qemu: SpinningQemu, folder: Path) -> AsyncIterator[Spinning]:
    """Connect an observer to it."""
    listening = await asyncio.start_unix_server(qemu.serve, folder / "qmp")
    monitor = Monitor("source", folder / "qmp")
    await monitor.connect()
    try:
        yield Spinning(monitor)
    finally:
        await monitor.disconnect()
        listening.close()


def test_a_limit_ends_a_wait_whose_answer_is_behind_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends before the answer came; the cancel is then sent, and the answer that comes late is nobody's."""
    qemu = SpinningQemu()

    async def spin() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        async with watching(qemu, tmp_path) as observer:
            with pytest.raises(TimeLimitError, match=r"not within 0\.05 s; QEMU did not answer"):
                await observer.wait_final()
            seen = list(observer.samples)
            assert not observer.cancelled
            await observer.cancel()
            assert observer.cancelled
            return seen, observer.samples[-1]

    with caplog.at_level(logging.WARNING):
        seen, last = asyncio.run(spin())
    assert seen == []
    assert qemu.asked == ["qmp_capabilities", "query-migrate", "migrate_cancel", "query-migrate"]
    assert qemu.late == 1
    assert last["status"] == "cancelled"
    assert not caplog.records


def test_the_end_of_a_cancelled_migration_does_not_wait_for_the_answer_to_the_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is seen by the next question, before that answer; which comes late, and is nobody's."""
    monkeypatch.setattr("vfu_dev.lab.observer.ANSWER_SECONDS", 0.05)
    qemu = SpinningQemu(answers_cancel=False)

    async def give_up() -> str:
        async with watching(qemu, tmp_path) as observer:
            await observer.cancel()
            return str(observer.samples[-1]["status"])

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(give_up()) == "cancelled"
    assert qemu.asked == ["qmp_capabilities", "migrate_cancel", "query-migrate"]
    assert qemu.late == 1
    assert not caplog.records
