"""Live migrations by a real QEMU without a CPU: what must come out, and what the traces must show."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, dirtying, small

from vfu_dev.lab.lab import Lab
from vfu_dev.lab.migrate import run
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.qemu_events import TRACE_PATTERNS
from vfu_dev.report.page import write_report
from vfu_dev.vm.servers import ControlledServer
from vfu_dev.workload import Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]


def migrate(options: MigrateOptions, folder: Path) -> MigrationResult:
    """Run the whole move."""
    return asyncio.run(run(options, folder / "logs", ["vfu-dev", "lab", "migrate"]))


@pytest.fixture(scope="module")
def converged(qemu: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> MigrationResult:
    """One migration under load, looked at by several tests."""
    # QEMU reads 1 MiB at a time: 4 MiB of initial data take more than three reads, however fast they are.
    # 2 MiB/s against 1 MiB/s of dirtying: several passes, each shorter than the one before it.
    # Switched over below 64 KiB, less than is dirtied between two looks of QEMU: there is a dirty pass.
    options = small(
        qemu,
        library,
        memory_bytes=4 * MIB,
        max_bandwidth=2 * MIB,
        switchover_bandwidth=640 * KIB,
        switchover_ack=True,  # not before the end of initial data, even if the lab writes nothing meanwhile
        load=dirtying(MIB),
    )
    return migrate(options, tmp_path_factory.mktemp("converged"))


def test_device_under_load_moves_whole(converged: MigrationResult) -> None:
    """Everything agrees: QEMU, both servers, both digests and the writer's own journal."""
    assert converged.problems == []
    assert converged.status == "completed"
    device = converged.devices[0]
    assert device.digest_match
    assert device.digest_source
    assert device.initial_bytes > 4 * MIB  # content and framing
    assert device.precopy_bytes > device.stop_copy_bytes > 0
    assert converged.qemu.vfio_bytes == device.precopy_bytes + device.stop_copy_bytes
    assert converged.guest is not None
    assert converged.guest.compared_bytes == 4 * MIB
    assert converged.guest.mismatched_bytes == 0
    assert converged.guest.writes > 0
    assert converged.guest.generation == 1


def test_a_running_migration_is_sampled_by_figures_alone(
    options: Options, in_lab: InLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other command reaches a server from `migrate` until all was sent: none can read its memory then."""
    asked: list[tuple[str, str]] = []
    command = ControlledServer.command

    async def recorded(server: ControlledServer, name: str, **arguments: Any) -> Any:
        asked.append((server.name, name))
        return await command(server, name, **arguments)

    async def move(lab: Lab) -> MigrationResult:
        result = MigrationResult()
        await lab.configure()
        monkeypatch.setattr(ControlledServer, "command", recorded)
        await lab.begin(await lab.listen())
        assert (await lab.wait_final())["status"] == "completed"
        during = set(asked)
        await lab.wait_running(lab.destination.qemu)
        await lab.guest.follow(lab.destination.qemu)
        await lab.collect(result)
        assert during == {(side.servers[0].name, "figures") for side in (lab.source, lab.destination)}
        return result

    result = in_lab(options(load=dirtying(MIB)), move)
    assert result.devices[0].digest_match
    assert result.devices[0].precopy_bytes > 0
    assert {name for _, name in asked} > {"figures"}  # what is asked at the end is recorded too


def test_json_has_the_contract(converged: MigrationResult) -> None:
    """The names that documents and checks rely on are there."""
    out = converged.to_json()
    assert out["status"] == "completed"
    assert {
        "name", "digest_source", "digest_destination", "digest_match",
        "initial_bytes", "precopy_bytes", "stop_copy_bytes", "passes",
    } <= out["devices"][0].keys()  # fmt: skip
    assert {"version", "downtime_ms", "total_ms", "vfio_bytes"} <= out["qemu"].keys()
    assert {"verified", "mismatched_bytes"} <= out["guest"].keys()


def test_source_goes_through_precopy(converged: MigrationResult) -> None:
    """PRE_COPY in save setup, initial data falling to zero, then dirty data, then STOP_COPY."""
    trace = converged.qemu.trace_source
    names = [event["event"] for event in trace]
    asked = [event["state"] for event in trace[: names.index("vfio_save_setup")] if "state" in event]
    assert asked[-1] == "PRE_COPY"
    rows = [event["values"] for event in trace if event["event"] == "vfio_save_iterate"]
    initial = [row["initial"] for row in rows]
    assert len(rows) >= 3
    assert any(initial)
    assert all(later <= earlier for earlier, later in itertools.pairwise(initial))
    assert initial[-1] == 0
    stop = next(i for i, event in enumerate(trace) if event.get("state") == "STOP_COPY")
    assert stop > max(i for i, name in enumerate(names) if name == "vfio_save_iterate")
    assert converged.qemu.states_source[-1] == "STOP"


def test_goes_on_until_the_downtime_limit_can_be_kept(options: Options, in_lab: InLab) -> None:
    """With 100 bytes of downtime QEMU never switches over; what was dirtied falls pass by pass."""

    async def scenario(lab: Lab) -> MigrationResult:
        server = lab.source.servers[0]
        await lab.configure()
        await lab.begin(await lab.listen())
        await lab.wait_for(lambda row: row["source"][0].get("initial_bytes") == 0, "the end of initial data")
        # The device writes by itself, in the thread that serves reads: faster than QEMU reads, however busy
        # the machine is. The wait ends when twice the memory has been read.
        await server.command("load", load=Workload("sequential", rate_pages=20_000).to_dict())
        await lab.wait_for(
            lambda row: (
                row["source"][0]["precopy_bytes"] >= 2 * lab.options.memory_bytes
                and row["source"][0]["dirty_bytes"] >= 2 * MIB
            ),
            "a dirty device",
        )
        await server.command("load", load=None)
        row = await lab.wait_for(lambda row: row["source"][0]["dirty_bytes"] == 0, "a clean device")
        assert row["status"] == "active"
        await lab.source.qemu.execute(
            "migrate-set-parameters", downtime_limit=300, avail_switchover_bandwidth=MIB
        )
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        result = MigrationResult()
        await lab.collect(result)
        return result

    impossible = options(
        memory_bytes=3 * MIB,
        load=dirtying(0),
        max_bandwidth=4 * MIB,  # 410 KiB each 100 ms
        switchover_bandwidth=100_000,
        downtime_limit_ms=1,
    )
    result = in_lab(impossible, scenario)
    assert result.devices[0].digest_match
    assert result.devices[0].pages_resent >= 768
    rows = [e["values"] for e in result.qemu.trace_source if e["event"] == "vfio_save_iterate"]
    last_initial = max(i for i, row in enumerate(rows) if row["initial"])
    dirty = [row["dirty"] for row in rows[last_initial + 1 :]]
    falling = dirty[dirty.index(max(dirty)) :]
    # QEMU reads 1 MiB at a time, so 3 MiB take several lines.
    assert falling[0] > 0
    assert len(set(falling)) >= 2
    assert falling[-1] == 0


def test_destination_resumes_then_runs(converged: MigrationResult) -> None:
    """RESUMING, then RUNNING, in QEMU's trace and in the server's own account."""
    states = converged.qemu.states_destination
    assert states[0] == "RESUMING"
    assert states[-1] == "RUNNING"
    told = [change["to"] for change in converged.devices[0].transitions_destination]
    assert told.index("RESUMING") < len(told) - 1
    assert told[-1] == "RUNNING"


def assert_estimates_agree(result: MigrationResult) -> None:
    """QEMU's estimate (initial + dirty) and its exact figure are about the same data: no spinning.

    It asks for them one after the other, so nobody may write meanwhile.
    """
    trace = result.qemu.trace_source
    exact = [event["values"] for event in trace if event["event"] == "vfio_state_pending_exact"]
    compared = [values for values in exact if values["initial"] + values["dirty"]]
    assert compared
    for values in compared:
        assert 0 <= values["stop_copy"] - values["initial"] - values["dirty"] < 64 * KIB


def test_migration_events_are_kept(converged: MigrationResult) -> None:
    """VFIO_MIGRATION events name the device and its states on both sides."""
    seen = [e["data"]["device-state"] for e in converged.qemu.events_source if e["event"] == "VFIO_MIGRATION"]
    assert "pre-copy" in "".join(seen).replace("_", "-")
    there = [e for e in converged.qemu.events_destination if e["event"] == "VFIO_MIGRATION"]
    assert there[-1]["data"]["device-id"] == "vfu0"


def test_report_is_one_file_without_network(converged: MigrationResult, tmp_path: Path) -> None:
    """The page has the figures and the curves, and nothing that a browser would fetch."""
    page = write_report(converged.to_json(), tmp_path)
    text = page.read_text()
    assert text.count("<svg") == 4  # the course, the switchover, the passes, the phases
    assert converged.devices[0].digest_source is not None
    assert converged.devices[0].digest_source in text
    assert "0 bytes differ" in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?:https?:)?//", text)
    assert "<script" not in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_pre_copy_off_moves_all_in_stop_copy(options: Options, tmp_path: Path) -> None:
    """A device that does not announce PRE_COPY is stopped, sent whole, and arrives whole."""
    # Without PRE_COPY, QEMU switches over only when the whole device fits.
    result = migrate(options(pre_copy=False, switchover_bandwidth=64 * MIB, downtime_limit_ms=300), tmp_path)
    assert result.problems == []
    assert result.devices[0].precopy_bytes == 0
    assert result.devices[0].stop_copy_bytes > MIB
    assert "PRE_COPY" not in result.qemu.states_source


@pytest.mark.parametrize("acknowledge", [False, True])
def test_switchover_ack_sends_initial_data_first(options: Options, in_lab: InLab, acknowledge: bool) -> None:
    """With switchover-ack, STOP_COPY waits for initial data even where all would fit into the downtime."""

    async def scenario(lab: Lab) -> MigrationResult:
        assert (await lab.migrate())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        result = MigrationResult()
        await lab.collect(result)
        return result

    # The threshold is 2 GiB, of 1 GiB/s and 2 s: QEMU would stop at once, with initial data left.
    generous = options(
        memory_bytes=3 * MIB,
        max_bandwidth=2 * MIB,
        switchover_bandwidth=1 << 30,
        downtime_limit_ms=2000,
        load=dirtying(0),
        switchover_ack=acknowledge,
    )
    result = in_lab(generous, scenario)
    device = result.devices[0]
    assert device.digest_match
    assert ("switchover-ack" in result.qemu.capabilities) == acknowledge
    iterations = [e["values"] for e in result.qemu.trace_source if e["event"] == "vfio_save_iterate"]
    assert (bool(iterations) and iterations[-1]["initial"] == 0) == acknowledge
    assert (device.precopy_bytes >= device.initial_bytes) == acknowledge
    assert_estimates_agree(result)


@pytest.mark.parametrize("window", ["on", "off"])
def test_migration_data_is_in_a_window_on_both_sides(options: Options, tmp_path: Path, window: str) -> None:
    """QEMU shares memory with each server. Without it, data goes by messages, and the result is the same."""
    event = "vfio_user_mig_window"
    chosen = options(
        traces=(*TRACE_PATTERNS, event), load=dirtying(0), server_extra=("--data-window", window)
    )
    result = migrate(chosen, tmp_path)
    assert result.problems == []
    assert result.devices[0].digest_match
    for side in ("source", "destination"):
        said = (tmp_path / "logs" / f"{side}-trace.log").read_text()
        assert "vfio_migration_set_state" in said
        shared = re.findall(rf"{event} .* size [1-9]\d* ret 0$", said, re.MULTILINE)
        assert len(shared) == (window == "on"), said


@pytest.mark.parametrize("pattern", ["sequential", "hotset"])
def test_other_patterns(options: Options, tmp_path: Path, pattern: str) -> None:
    """Each pattern's writes are where its journal says."""
    result = migrate(options(memory_bytes=256 * KIB, load=dirtying(256 * KIB, pattern)), tmp_path)
    assert result.problems == []


def test_two_devices_move_together(options: Options, tmp_path: Path) -> None:
    """QEMU migrates more than one VFIO device only if all have P2P; ours do, and each arrives whole."""
    result = migrate(options(devices=2, memory_bytes=256 * KIB, downtime_limit_ms=200), tmp_path)
    assert result.problems == []
    assert len(result.devices) == 2
    assert result.devices[0].digest_source != result.devices[1].digest_source
    assert "PRE_COPY_P2P" in result.qemu.states_source


def test_library_and_page_take_a_failed_run(unpatched: Path, library: Path, tmp_path: Path) -> None:
    """A run that cannot even start says why, and still leaves a page."""
    result = migrate(small(unpatched, library, front_end="vfio-user-pci"), tmp_path)
    assert result.status == "failed"
    assert any("does not migrate devices through vfio-user-pci" in text for text in result.problems)
    page: dict[str, Any] = result.to_json()
    assert "does not migrate" in write_report(page, tmp_path).read_text()
