"""Debian's own QEMUs, 10.0 and 11.1, by their own vfio-pci: one running Linux guest is moved there and back.

The guest has two devices. It writes to both and checks what it reads, and both write to its memory all the
time (their writers, docs/device.md): digests would not see guest memory that was lost. Each test is one move
of the same VM, so they build on each other: the first boots it, the last but one reads everything back.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from labkit import KIB, MIB, begin_and_stay, dirtying, let_go, small
from serverkit import PATIENCE_SECONDS, run_vfu_dev

from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.builds.qemu_packages import SUITES
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.qemu_events import TRACE_PATTERNS, Kind
from vfu_dev.vm.guest import LinuxGuest

T = TypeVar("T")

OLD, NEW = (suite.name for suite in SUITES)
DEVICES = 2
BUFFER_BYTES = MIB
# QEMU's trace of an acknowledgement that came back, migration/trace-events.
ACKED = "source_return_path_thread_switchover_acked"


class Vm:
    """The lab with the running VM, and what is asserted of each of its moves."""

    def __init__(self, runner: asyncio.Runner, lab: Lab) -> None:
        self.run = runner.run
        self.lab = lab

    @property
    def guest(self) -> LinuxGuest:
        """The guest, which follows the VM."""
        assert isinstance(self.lab.guest, LinuxGuest)
        return self.lab.guest

    async def start(self) -> None:
        """Boot the guest; its load starts, and both devices' writers."""
        await self.lab.start()
        assert await self.guest.command(f"writer buffer={BUFFER_BYTES} rate={4 * MIB}")

    def configure(self, **capabilities: bool) -> None:
        """Set these capabilities of the next move, and no others of those that the tests set."""
        wanted = {"multifd": False, "switchover-ack": False, **capabilities}
        self.lab.options = replace(self.lab.options, capabilities=tuple(wanted.items()))

    async def move(self) -> MigrationResult:
        """Move the VM; devices and guest memory are whole; the destination becomes the next source."""
        result = await self.lab.move()
        await self.arrived(result)
        return result

    async def arrived(self, result: MigrationResult) -> None:
        """Check what moved, and turn around."""
        judge(result, pre_copy=True, verified=False)
        assert result.problems == []
        assert [device.digest_match for device in result.devices] == [True] * DEVICES
        stamps = await self.guest.command("writer-check again=1")
        assert (stamps["wrong_bytes"], stamps["status"]) == (0, 1), stamps
        assert stamps["stamps"] > stamps["pages"]
        await self.lab.turn_around(keep_logs=True)

    async def fails(self) -> dict[str, Any]:
        """Let the migration go on, and return what QEMU says in the end; servers may be gone."""
        await let_go(self.lab)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (reply := await self.lab.source.qemu.migration())["status"] not in ("failed", "cancelled"):
                assert reply["status"] != "completed", reply
                await asyncio.sleep(0.05)
        return reply

    async def goes_on(self) -> None:
        """After a migration that failed: the VM runs at the source, and every device of it does."""
        await self.lab.wait_running(self.lab.source.qemu)
        for server in self.lab.source.servers:
            assert (await server.status())["state"] == "RUNNING"
        ticks = len(self.guest.events)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.guest.events) == ticks:
                await asyncio.sleep(0.02)
        await self.lab.replace_destination()
        await self.lab.forget()


@pytest.fixture(scope="module")
def vm(
    stock_qemu: Callable[[str], QemuBinary],
    preload: Path,
    library: Path,
    guest_image: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Vm]:
    """Boot the VM in 10.0, with a destination in 11.1."""
    options = MigrateOptions(
        qemu=stock_qemu(OLD).path,
        iommu="type1",
        qemu_destination=stock_qemu(NEW).path,
        library=library,
        guest_image=guest_image,
        memory_bytes=2 * MIB,
        devices=DEVICES,
        load=dirtying(256 * KIB),
        max_bandwidth=64 * MIB,
        switchover_bandwidth=8 * MIB,  # 2.4 MiB in 300 ms: less than both devices have
        warmup_seconds=0.2,
        settle_seconds=0.2,
        timeout_seconds=PATIENCE_SECONDS,
    )
    with asyncio.Runner() as runner:
        lab = Lab(options, tmp_path_factory.mktemp("stock") / "logs")
        try:
            found = Vm(runner, lab)
            runner.run(found.start())
            yield found
        finally:
            runner.run(lab.close())


def test_from_10_0_to_11_1_with_p2p_and_switchover_ack(vm: Vm) -> None:
    """Two devices, which QEMU takes through the P2P states; the destination has agreed before they stop."""
    vm.configure(**{"switchover-ack": True})
    found = vm.run(vm.move()).to_json()["qemu"]
    assert (found["version"], found["front_end"], found["machine"]) == (None, "vfio-pci", "pc-q35-10.0")
    assert found["source"]["version"].startswith("10.0.")
    assert found["destination"]["version"].startswith("11.1.")
    assert [found[side]["iommu"] for side in ("source", "destination")] == ["type1", "iommufd-cdev"]
    assert "switchover-ack" in found["capabilities"]
    states = found["states_source"]
    assert states.count("PRE_COPY_P2P") == DEVICES
    assert states.index("STOP_COPY") > max(i for i, state in enumerate(states) if state == "PRE_COPY_P2P")
    assert found["states_destination"].count("RESUMING") == DEVICES


def test_back_to_10_0_with_multifd(vm: Vm) -> None:
    """The device state of STOP_COPY goes through QEMU's channels, in buffers that are numbered."""
    vm.configure(multifd=True)
    result = vm.run(vm.move())
    assert result.qemu.source.version is not None
    assert result.qemu.source.version.startswith("11.1.")
    sent = {
        event["device"] for event in result.qemu.trace_source if event["event"].endswith("precopy_thread_end")
    }
    came = {
        event["device"]
        for event in result.qemu.trace_destination
        if event["event"] == "vfio_load_state_device_buffer_incoming"
    }
    assert (len(sent), len(came)) == (DEVICES, DEVICES)


def test_cancelled_and_tried_again(vm: Vm) -> None:
    """The devices are RUNNING again, and nothing of the first try is in the second."""
    vm.configure()

    async def scenario() -> None:
        await begin_and_stay(vm.lab)
        await vm.lab.source.qemu.execute("migrate_cancel")
        assert (await vm.fails())["status"] == "cancelled"
        await vm.goes_on()
        await vm.move()

    vm.run(scenario())


def test_a_destination_of_another_shape_is_refused(vm: Vm) -> None:
    """Its device reads the first bytes and refuses; the source's QEMU is told, and its VM has not stopped."""
    vm.configure()

    async def scenario() -> str:
        await vm.lab.replace_destination(replace(vm.lab.options, page_size=8192))
        await vm.lab.configure()
        await vm.lab.begin(await vm.lab.listen())
        reply = await vm.fails()
        refused = (await vm.lab.destination.servers[0].status())["resume"]["error"]
        assert reply["status"] == "failed"
        await vm.goes_on()
        await vm.move()
        return str(refused)

    assert "page" in vm.run(scenario())


def test_a_destination_s_server_that_dies_costs_nothing_at_the_source(vm: Vm) -> None:
    vm.configure()

    async def scenario() -> None:
        await begin_and_stay(vm.lab)
        vm.lab.destination.servers[0].process.send_signal(signal.SIGKILL)
        assert (await vm.fails())["status"] == "failed"
        await vm.goes_on()
        await vm.move()

    vm.run(scenario())


def test_through_a_file(vm: Vm, tmp_path: Path) -> None:
    """Written by one version, read by the other; nobody answers on the way."""
    vm.configure()

    async def scenario() -> None:
        lab, result = vm.lab, MigrationResult()
        uri = f"file:{tmp_path / 'vm.state'}"
        await lab.configure(return_path=False)
        await lab.begin(uri)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.destination.qemu.execute("migrate-incoming", uri=uri)
        await lab.wait_running(lab.destination.qemu, PATIENCE_SECONDS)
        await lab.follow()
        await lab.collect(result)
        await vm.arrived(result)

    vm.run(scenario())


def test_the_guest_reads_back_all_that_it_wrote(vm: Vm) -> None:
    """Through all moves before: every byte of both devices, and every read-back on the way."""

    async def scenario() -> Any:
        await vm.guest.stop()
        return await vm.guest.verify()

    found = vm.run(scenario())
    assert (found.verified, found.mismatched_bytes, found.scratch_errors, found.readback_errors) == (
        True,
        0,
        0,
        0,
    )
    assert found.compared_bytes == DEVICES * 2 * MIB
    assert found.writes > 0


def test_a_source_s_server_that_dies_takes_its_device_and_not_the_vm(vm: Vm) -> None:
    """The migration fails, the VM runs on with the other device; this one is as if it was not there."""
    vm.configure()

    async def scenario() -> str:
        await begin_and_stay(vm.lab)
        vm.lab.source.servers[0].process.send_signal(signal.SIGKILL)
        assert (await vm.fails())["status"] in ("failed", "cancelled")
        await vm.lab.wait_running(vm.lab.source.qemu)
        assert (await vm.lab.source.servers[1].status())["state"] == "RUNNING"
        return vm.lab.source.qemu.process.log.read_text(errors="replace")

    assert "the device is dead" in vm.run(scenario())


@pytest.mark.parametrize("suite", [OLD, NEW])
def test_the_whole_command(
    suite: str,
    stock_qemu: Callable[[str], QemuBinary],
    preload: Path,
    library: Path,
    guest_image: Path,
    tmp_path: Path,
) -> None:
    """What `make demo-stock` runs, smaller."""
    version = stock_qemu(suite).version
    command = ["lab", "migrate", "--qemu", suite, "--memory", "1M"]
    command += ["--dirty-rate", "1M", "--avail-switchover-bandwidth", "1M", "--out", str(tmp_path / "out")]
    done = run_vfu_dev(*command)
    # 3: the machine was too busy for the load, which says nothing of the migration.
    assert done.returncode in (0, 3), done.stderr
    result = json.loads((tmp_path / "out/report.json").read_text())
    side = {"version": version, "front_end": "vfio-pci", "iommu": "iommufd-cdev"}
    assert (result["qemu"]["source"], result["qemu"]["destination"]) == (side, side)
    assert (result["qemu"]["version"], result["qemu"]["front_end"]) == (version, "vfio-pci")
    assert result["guest"]["verified"]
    assert result["devices"][0]["digest_match"]
    assert result["devices"][0]["precopy_bytes"] > MIB
    assert f"QEMU {version} with vfio-pci over iommufd-cdev" in done.stderr


@pytest.mark.parametrize("reinit", [False, True])
def test_initial_data_that_appears_late_is_acknowledged_again(
    reinit: bool,
    stock_qemu: Callable[[str], QemuBinary],
    preload: Path,
    library: Path,
    tmp_path: Path,
) -> None:
    """11.1 opts in to VFIO_PRECOPY_INFO_REINIT: it takes the new data to the other side before it stops."""
    options = small(
        stock_qemu(NEW).path,
        library,
        memory_bytes=2 * MIB,
        switchover_ack=True,
        load=dirtying(MIB),
        traces=(*TRACE_PATTERNS, ACKED),
    )

    async def scenario() -> tuple[MigrationResult, str]:
        async with Lab(options, tmp_path / "logs") as lab:
            await lab.start()
            await begin_and_stay(lab)
            await lab.wait_for(
                lambda row: row["source"][0].get("initial_bytes") == 0 and row["source"][0]["passes"] >= 2,
                "the initial data is out",
            )
            if reinit:
                await lab.source.servers[0].command("reinit", pages=512)
            await let_go(lab)
            assert (await lab.wait_final())["status"] == "completed"
            await lab.wait_running(lab.destination.qemu)
            result = MigrationResult()
            await lab.collect(result)
            return result, lab.source.qemu.trace_log.read_text()

    result, trace = asyncio.run(scenario())
    (device,) = result.devices
    assert device.digest_match
    assert device.save is not None
    assert device.save["reinits"] == int(reinit)
    told = [event for event in result.qemu.trace_source if event.get("kind") == Kind.PRECOPY_INFO]
    assert any(event["values"]["reinit"] for event in told) == reinit
    assert len(re.findall(rf"\b{ACKED}\b", trace)) == 1 + reinit
    if reinit:
        assert device.precopy_bytes >= device.initial_bytes + 2 * MIB
