"""Debian's own QEMUs, 10.0 and 11.1, by their own vfio-pci: one running Linux guest is moved there and back.

Each test is a move of the same VM, over each IOMMU path of both, with RAM of each kind, or a move that fails;
one that is run alone brings the VM to where it begins. Cells of docs/qemu-versions.md they show: `shows`.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from itinerary import NEW, OLD, Leg, Place, Vm, as_parameters, vm_in, with_both, without
from labkit import (
    CANCELLED,
    MIB,
    PRELOAD_PATIENT,
    begin_and_stay,
    dirtying,
    let_go,
    small,
    until,
    wait_back_at_source,
)
from serverkit import run_vfu_dev
from versionkit import ACKED, Evidence, shows

from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.result import MigrationResult
from vfu_dev.qemu_events import TRACE_PATTERNS, Kind

AT_OLD, AT_NEW = Place("10.0", "type1"), Place("11.1", "type1")
OLD_CDEV, NEW_CDEV = Place("10.0", "iommufd-cdev"), Place("11.1", "iommufd-cdev")
OLD_FD, NEW_FD = Place("10.0", "iommufd-fd"), Place("11.1", "iommufd-fd")


def private(place: Place, *, forgets: bool = False) -> Place:
    """The same with share=off, so that all of the devices' DMA goes by message."""
    return replace(place, ram="private", forgets=forgets)


def anonymous(place: Place) -> Place:
    """The same with RAM that has no file."""
    return replace(place, ram="anonymous")


FORGETFUL_OLD, FORGETFUL_NEW = private(OLD_CDEV, forgets=True), private(AT_NEW, forgets=True)
# Each IOMMU path of both versions is a source, and each kind of RAM, by descriptor and by message; on the way
# each log of DMA is off once in each version.
LEGS = [
    with_both(AT_OLD, NEW_CDEV),
    with_both(NEW_CDEV, FORGETFUL_OLD),
    without("library", FORGETFUL_OLD, anonymous(NEW_FD)),
    with_both(anonymous(NEW_FD), private(AT_OLD)),
    with_both(private(AT_OLD), FORGETFUL_NEW),
    without("library", FORGETFUL_NEW, OLD_CDEV),
    without("server", OLD_CDEV, private(AT_NEW)),
    with_both(private(AT_NEW), anonymous(OLD_CDEV)),
    with_both(anonymous(OLD_CDEV), AT_NEW),
    without("server", AT_NEW, OLD_FD),
]
# What follows them.
FIRST_TRY = with_both(OLD_FD, AT_NEW)
FILES = [Leg(AT_NEW, OLD_CDEV, features=("file",)), Leg(OLD_CDEV, NEW_CDEV, features=("file",))]
SECOND_TRY = with_both(NEW_CDEV, OLD_FD)


@pytest.fixture(scope="module")
def vm(library: Path, guest_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    """The VM, booted in 10.0."""
    with vm_in(tmp_path_factory.mktemp("stock"), LEGS[0], library, guest_image) as found:
        yield found


@pytest.mark.parametrize("leg", as_parameters(LEGS))
def test_devices_and_guest_memory_arrive_whole(leg: Leg, vm: Vm, evidence: Evidence) -> None:
    """And where a log of DMA is off, guest memory does not, which is noticed."""
    result = vm.run(vm.travel(leg, evidence))
    if not leg.lost:
        found = result.to_json()["qemu"]
        assert (found["version"], found["front_end"], found["machine"]) == (None, "vfio-pci", "pc-q35-10.0")
        for side, place in (("source", leg.source), ("destination", leg.destination)):
            assert found[side]["version"].startswith(f"{place.qemu}."), found
            assert found[side]["iommu"] == place.iommu


async def fail_and_move(vm: Vm, leg: Leg, evidence: Evidence) -> None:
    """Cancel; have a destination of another shape refuse; kill a destination's server. Then it moves."""
    lab = vm.lab
    await vm.face(leg.source, leg.destination)
    vm.configure()
    await begin_and_stay(lab)
    await lab.source.qemu.execute("migrate_cancel")
    assert (await vm.fails())["status"] in CANCELLED
    await vm.goes_on()

    # Its device refuses the first bytes. The source's QEMU learns of it while its VM still runs.
    await lab.replace_destination(replace(lab.options, page_size=8192))
    await lab.configure()
    await lab.begin(await lab.listen())
    assert (await vm.fails())["status"] == "failed"
    assert "page" in (await lab.destination.servers[0].status())["resume"]["error"]
    await vm.goes_on()

    await vm.face(leg.source, leg.destination, fresh=True)
    await begin_and_stay(lab)
    lab.destination.servers[0].process.send_signal(signal.SIGKILL)
    assert (await vm.fails())["status"] == "failed"
    await vm.goes_on()

    # Nothing of what failed is in what arrives.
    await vm.face(leg.source, leg.destination, fresh=True)
    await vm.travel(leg, evidence)


@pytest.mark.parametrize("leg", as_parameters([FIRST_TRY]))
def test_what_fails_costs_10_0_nothing(leg: Leg, vm: Vm, evidence: Evidence) -> None:
    """The VM and its devices run on at the source, and move at the next try."""
    vm.run(fail_and_move(vm, leg, evidence))


@pytest.mark.parametrize("leg", as_parameters(FILES))
def test_through_a_file(leg: Leg, vm: Vm, evidence: Evidence, tmp_path: Path) -> None:
    """Written by one version, read by the other; nobody answers on the way."""

    async def scenario() -> None:
        await vm.face(leg.source, leg.destination)
        vm.configure()
        await vm.through_file(tmp_path / "vm.state", evidence)

    vm.run(scenario())


@pytest.mark.parametrize("leg", as_parameters([SECOND_TRY]))
def test_what_fails_costs_11_1_nothing(leg: Leg, vm: Vm, evidence: Evidence) -> None:
    """The same the other way round."""
    vm.run(fail_and_move(vm, leg, evidence))


def test_the_guest_reads_back_all_that_it_wrote(vm: Vm) -> None:
    """Through all moves before: every byte of both devices, and every read-back on the way."""
    vm.run(vm.read_back())


def test_a_source_s_server_that_dies_takes_its_device_and_not_the_vm(vm: Vm) -> None:
    """In 10.0; in 11.1: test_preload_unmodified_qemus.py. The VM runs on with the other device."""

    async def scenario() -> str:
        await vm.face(OLD_FD, AT_NEW)
        vm.configure()
        await begin_and_stay(vm.lab)
        vm.lab.source.servers[0].process.send_signal(signal.SIGKILL)
        assert (await vm.fails())["status"] in CANCELLED
        await wait_back_at_source(vm.lab, vm.lab.source.servers[1])
        return vm.lab.source.qemu.process.log.read_text(errors="replace")

    assert "the device is dead" in vm.run(scenario())


@pytest.mark.parametrize("suite", [OLD, pytest.param(NEW, marks=pytest.mark.soak)])
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


def reinit_case(path: str, *marks: pytest.MarkDecorator) -> Any:
    """A path on which initial data appears again."""
    return pytest.param(
        path, True, marks=[shows(Place("11.1", path).row, "PRE_COPY", "ack", "REINIT"), *marks]
    )


@pytest.mark.parametrize(
    ("path", "reinit"),
    [
        ("iommufd-cdev", False),
        reinit_case("iommufd-cdev"),
        reinit_case("iommufd-fd", pytest.mark.soak),
        reinit_case("type1", pytest.mark.soak),
    ],
)
def test_initial_data_that_appears_late_is_acknowledged_again(
    path: str,
    reinit: bool,
    evidence: Evidence,
    stock_qemu: Callable[[str], QemuBinary],
    preload: Path,
    library: Path,
    tmp_path: Path,
) -> None:
    """11.1 opts in to VFIO_PRECOPY_INFO_REINIT: it takes the new data to the other side before it stops."""
    options = small(
        stock_qemu(NEW).path,
        library,
        iommu=path,
        memory_bytes=2 * MIB,
        switchover_ack=True,
        load=dirtying(MIB),
        qemu_environment=PRELOAD_PATIENT,
        traces=(*TRACE_PATTERNS, ACKED),
    )

    async def scenario() -> tuple[MigrationResult, str]:
        async with Lab(options, tmp_path / "logs") as lab:

            async def acknowledged() -> bool:
                return ACKED in lab.source.qemu.trace_log.read_text(errors="replace")

            await lab.start()
            await begin_and_stay(lab)
            await lab.wait_for(
                lambda row: row["source"][0].get("initial_bytes") == 0 and row["source"][0]["passes"] >= 2,
                "the initial data is out",
            )
            # The destination may still have to read it: two acknowledgements in one are not two.
            await until(acknowledged, "the initial data is acknowledged")
            if reinit:
                await lab.source.servers[0].command("reinit", pages=512)
            await let_go(lab)
            assert (await lab.wait_final())["status"] == "completed"
            await lab.wait_running(lab.destination.qemu)
            result = MigrationResult()
            await lab.collect(result)
            evidence.of_move(lab, result)
            return result, lab.source.qemu.trace_log.read_text()

    result, trace = asyncio.run(scenario())
    (device,) = result.devices
    assert device.save is not None
    assert device.save["reinits"] == int(reinit)
    told = [event for event in result.qemu.trace_source if event.get("kind") == Kind.PRECOPY_INFO]
    assert any(event["values"]["reinit"] for event in told) == reinit
    assert len(re.findall(rf"\b{ACKED}\b", trace)) == 1 + reinit
    if reinit:
        assert device.precopy_bytes >= device.initial_bytes + 2 * MIB
