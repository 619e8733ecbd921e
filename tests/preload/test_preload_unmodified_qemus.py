"""Unmodified QEMUs: their own hw/vfio, by each of its three ways, with the device's DMA writer running.

Most of it with QEMU 10.2 without the project's patches, and with a guest without a CPU: test_lab_stock.py has
a Linux guest moved by Debian's 10.0 and 11.1. Digests do not see memory that was lost, so every move also
checks what the device wrote.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from preloadkit import preload_of, run_preloaded
from serverkit import ServerFactory, wait_until
from stockkit import Stock, with_stock
from versionkit import Evidence, Row, shows

from vfu_dev.attach.front_end import IOMMU_PATHS
from vfu_dev.builds import artifact, firmware_dirs
from vfu_dev.errors import BuildError, LabError
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.vm.qemu import RamKind

sys.path.append(str(Path(__file__).parents[1] / "lab"))  # what is known there about guests without a CPU

from labkit import CANCELLED, MIB, dirtying, small, until, wait_back_at_source
from pcilab import wait_devices
from qtestkit import Registers, moving
from test_lab_dma import BUFFERS, start_writer, writer_migrates, wrong_bytes

T = TypeVar("T")

UNPATCHED, BOOKWORM, TRIXIE = "qemu-unpatched", "qemu-bookworm-backports", "qemu-trixie-backports"

# Each way and each kind of RAM, and the pair that is a case of its own: test_device_and_memory_arrive.
WAYS_AND_RAM: list[tuple[str, RamKind]] = [
    ("iommufd-cdev", "shared"),
    ("iommufd-cdev", "private"),
    ("iommufd-fd", "anonymous"),
    ("type1", "private"),
]


def stock(name: str, path: str, ram: RamKind = "shared", **environment: str) -> Stock:
    """Return how that QEMU is started; a test whose QEMU is not there is skipped, and says so."""
    preload_of("plain")
    try:
        program = artifact(name)
    except BuildError as error:
        pytest.skip(str(error))
    return Stock(program, path, ram, tuple(environment.items()))


@pytest.fixture
def in_lab(tmp_path: Path, library: Path) -> Callable[..., Any]:
    """Run a scenario in a lab of these QEMUs, and stop everything after it."""

    def run(
        chosen: MigrateOptions,
        scenario: Callable[[Lab], Coroutine[Any, Any, T]],
        source: Stock,
        destination: Stock | None = None,
    ) -> T:
        async def whole() -> T:
            async with Lab(with_stock(chosen, source, destination), tmp_path / "logs") as lab:
                await lab.start()
                return await scenario(lab)

        return asyncio.run(whole())

    return run


@pytest.fixture
def options(library: Path) -> Callable[..., MigrateOptions]:
    """Make options for a small device in a guest without a CPU."""
    return lambda **changes: small(artifact(UNPATCHED), library, **changes)


async def moved_whole(lab: Lab, *, logged: bool = True, evidence: Evidence | None = None) -> list[int]:
    """Migrate under the devices' writers; returns the wrong bytes of each, having compared the devices."""
    wrong = await writer_migrates(lab, logged=logged)
    result = MigrationResult()
    await lab.collect(result)
    if evidence is not None:
        evidence.of_move(lab, result)
    assert [device.digest_match for device in result.devices] == [True] * lab.options.devices
    for device in result.devices:
        assert device.initial_bytes > lab.options.memory_bytes
        assert device.precopy_bytes >= device.initial_bytes
    return wrong


@pytest.mark.parametrize(("path", "ram"), WAYS_AND_RAM)
def test_device_and_memory_arrive(
    path: str, ram: RamKind, in_lab: Callable[..., Any], options: Callable[..., MigrateOptions]
) -> None:
    """RAM with a descriptor is in the server's log, any other in the library's own."""
    chosen = stock(UNPATCHED, path, ram)
    # QEMU 10.2 has DMA go to the file, whose private copy is what the guest sees: hw/vfio/container.c.
    lost = ram == "private" and path != "type1"

    async def scenario(lab: Lab) -> list[int]:
        wrong = await moved_whole(lab)
        said = preload_log(lab.source.qemu)
        way = "message" if ram != "shared" and not lost else "descriptor"
        assert re.search(rf"DMA_MAP \[0, \+0x\w+\) flags 0x3 by {way}: ok", said)
        assert ("mapped privately (share=off)" in said) == lost
        return wrong

    (wrong,) = in_lab(moving(options), scenario, chosen)
    assert (wrong > 0) == lost


def preload_log(qemu: Any) -> str:
    said: str = qemu.preload_log.read_text(errors="replace")
    return said


@pytest.mark.parametrize("whose", ["server", "library"])
def test_the_same_check_fails_without_a_log(
    whose: str, in_lab: Callable[..., Any], options: Callable[..., MigrateOptions]
) -> None:
    """The server's, for RAM that it maps; the library's own, for any other. Debian's: test_lab_stock.py."""
    if whose == "server":
        chosen = stock(UNPATCHED, "iommufd-cdev")
    else:
        chosen = stock(UNPATCHED, "iommufd-cdev", "private", VFU_DEV_PRELOAD_FAULT="forget-writes")
    wrong = in_lab(moving(options), lambda lab: moved_whole(lab, logged=whose != "server"), chosen)
    assert wrong[0] > 0


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=shows(Row("10.2", "vfio-pci", path), "PRE_COPY", "P2P"))
        for path in IOMMU_PATHS
    ],
)
def test_three_devices_move_together(
    path: str, evidence: Evidence, in_lab: Callable[..., Any], options: Callable[..., MigrateOptions]
) -> None:
    """QEMU demands P2P of more than one, and takes them through its states."""

    async def scenario(lab: Lab) -> list[int]:
        wrong = await moved_whole(lab, evidence=evidence)
        said = preload_log(lab.source.qemu)
        for number in range(3):
            assert re.search(rf"device {number}: state 6 -> 7, data_fd -1: ok", said)
            assert re.search(rf"device {number}: state 7 -> 3, data_fd -1: ok", said)
        return wrong

    assert in_lab(moving(options, 3), scenario, stock(UNPATCHED, path)) == [0, 0, 0]


def test_every_call_that_qemu_makes_comes_by(
    in_lab: Callable[..., Any], options: Callable[..., MigrateOptions]
) -> None:
    """Our descriptors refuse what goes past (EBADF): QEMU works, so nothing did; the counts say what came."""

    async def scenario(lab: Lab) -> str:
        await moved_whole(lab)
        await lab.source.qemu.stop()
        return preload_log(lab.source.qemu)

    said = in_lab(moving(options), scenario, stock(UNPATCHED, "iommufd-cdev"))
    calls = {symbol: int(number) for symbol, number in re.findall(r"calls of (\w+): (\d+)", said)}
    assert {"ioctl", "read", "close", "open64"} <= set(calls)
    assert {"pread64", "__pread64_chk"} & set(calls)
    assert calls["pwrite64"] > 0
    assert calls["read"] == len(re.findall(r"MIG_DATA_READ of", said))
    assert not re.search(r"says: ", said)


def test_cancelled_and_tried_again(
    in_lab: Callable[..., Any], options: Callable[..., MigrateOptions]
) -> None:
    """The device is RUNNING again, its session over; the second migration is whole."""

    async def scenario(lab: Lab) -> list[int]:
        registers = Registers(lab)
        elsewhere = BUFFERS + 8 * MIB
        await start_writer(registers, elsewhere, 8 * MIB)
        await lab.configure()
        slow = {"max_bandwidth": 1 << 20, "avail_switchover_bandwidth": 1000}
        await lab.source.qemu.execute("migrate-set-parameters", **slow)
        await lab.begin(await lab.listen())
        await lab.wait_for(lambda row: row["source"][0]["state"] == "PRE_COPY", "PRE_COPY")
        await lab.source.qemu.execute("migrate_cancel")
        assert (await lab.wait_final())["status"] in CANCELLED
        await wait_back_at_source(lab)
        assert await wrong_bytes(registers, elsewhere) == 0
        await lab.replace_destination()
        return await moved_whole(lab)

    assert in_lab(moving(options), scenario, stock(UNPATCHED, "iommufd-cdev")) == [0]


@pytest.mark.parametrize(("name", "side"), [(TRIXIE, "source"), (UNPATCHED, "destination")])
def test_a_killed_server_costs_the_device_and_not_the_vm(
    name: str, side: str, in_lab: Callable[..., Any], options: Callable[..., MigrateOptions]
) -> None:
    """The migration fails with a reason; the source's VM runs on, its device all ones if it lost that."""

    async def scenario(lab: Lab) -> None:
        registers = Registers(lab)
        await lab.configure()
        slow = {"max_bandwidth": 1 << 20, "avail_switchover_bandwidth": 1000}
        await lab.source.qemu.execute("migrate-set-parameters", **slow)
        await lab.begin(await lab.listen())
        await lab.wait_for(lambda row: row["source"][0]["state"] == "PRE_COPY", "PRE_COPY")
        getattr(lab, side).servers[0].process.send_signal(signal.SIGKILL)
        fast = {"max_bandwidth": 1 << 30, "avail_switchover_bandwidth": 1 << 30}
        await lab.source.qemu.execute("migrate-set-parameters", **fast)
        reply = await until_final(lab)
        assert reply["status"] in ("failed", "cancelled"), reply
        await lab.wait_running(lab.source.qemu)  # QEMU says "failed" before it has the VM run again
        if side == "source":
            assert await registers.get("id") == 0xFFFFFFFF
            assert "the device is dead" in (await asyncio.to_thread(lab.source.qemu.process.log.read_text))
        else:
            assert await registers.get("id") == 0x44554656

    in_lab(moving(options), scenario, stock(name, "iommufd-cdev"))


async def until_final(lab: Lab) -> dict[str, Any]:
    """Wait for the end of the migration without asking the servers, one of which is gone."""
    async with asyncio.timeout(300):
        while (reply := await lab.source.qemu.migration()).get("status") in ("setup", "active", "device"):
            await asyncio.sleep(0.05)
    return reply


def test_without_a_server_qemu_says_why_it_does_not_start(
    in_lab: Callable[..., Any], options: Callable[..., MigrateOptions], tmp_path: Path
) -> None:
    """In its own words, after the library's."""
    chosen = stock(UNPATCHED, "iommufd-cdev", VFU_DEV_PRELOAD_SOCKET0=str(tmp_path / "nobody.sock"))

    async def scenario(lab: Lab) -> None:
        raise AssertionError("it started")

    with pytest.raises(LabError, match="No such file or directory"):
        in_lab(options(), scenario, chosen)
    text = (tmp_path / "logs" / "source.log").read_text()
    assert "cannot connect: No such file or directory (is the device server running?)" in text
    assert "error bind device" in text


# --- with a Linux guest -------------------------------------------------------------------------------------


@pytest.fixture
def linux(library: Path) -> Callable[..., MigrateOptions]:
    """Make options for a Linux guest with a small device."""
    try:
        guest = artifact("guest")
    except BuildError as error:
        pytest.skip(str(error))
    return lambda **changes: MigrateOptions(
        **{
            "qemu": artifact(UNPATCHED),
            "library": library,
            "guest_image": guest,
            "memory_bytes": 4 * MIB,
            "load": dirtying(0),
            "max_bandwidth": 64 * MIB,
            "warmup_seconds": 0.0,
            "traces": ("vfio_migration*",),
            **changes,
        }
    )


async def linux_moves(lab: Lab) -> None:
    """The guest's driver has interrupts and DMA under way; none is lost, and it reads everything back."""
    guest: Any = lab.guest
    assert (await guest.command("irq mode=msix"))["vectors"] == 4
    await guest.command(f"writer buffer={MIB} rate={16 * MIB}")
    await guest.command(f"dma rate={8 * MIB} vector=1")
    await lab.move()
    before = (await guest.command("dma-status"))["batches"]
    async with asyncio.timeout(300):
        while (await guest.command("dma-status"))["batches"] < before + 5:
            await asyncio.sleep(0.02)
    stamps, batches = await guest.command("writer-check"), await guest.command("dma-stop")
    assert (stamps["wrong_bytes"], stamps["status"]) == (0, 1)
    assert stamps["stamps"] > stamps["pages"]
    assert (batches["errors"], batches["mismatched_bytes"], batches["lost_interrupts"]) == (0, 0, 0)
    assert (await guest.command("verify"))["verified"]


def test_a_linux_guest_moves(in_lab: Callable[..., Any], linux: Callable[..., MigrateOptions]) -> None:
    in_lab(linux(), linux_moves, stock(UNPATCHED, "iommufd-cdev"))


def test_a_linux_guest_moves_between_versions(
    in_lab: Callable[..., Any], linux: Callable[..., MigrateOptions]
) -> None:
    """From the oldest to the newest and back, by different ways, with interrupts and DMA under way."""

    async def there_and_back(lab: Lab) -> None:
        await linux_moves(lab)
        await lab.turn_around()
        await linux_moves(lab)

    in_lab(linux(), there_and_back, stock(BOOKWORM, "type1"), stock(TRIXIE, "iommufd-cdev"))


def test_a_device_is_plugged_and_unplugged(
    in_lab: Callable[..., Any], linux: Callable[..., MigrateOptions]
) -> None:
    """The guest uses the one that came, and its server is free again; by iommufd: test_lab_hotplug.py."""

    async def scenario(lab: Lab) -> None:
        guest: Any = lab.guest
        await lab.source.plug()
        await wait_devices(guest, 2)
        assert (await guest.command("irq mode=msix"))["vectors"] == 4
        assert (await guest.command("irq mode=none"))["ok"]
        await guest.command("release device=1")
        server = lab.source.servers[1]

        async def given_back() -> bool:
            return not (await server.status())["connected"]

        assert (await server.status())["connected"]
        await lab.source.qemu.unplug(1)
        await until(given_back, "QEMU has let go of the server")
        await lab.source.qemu.plug(1, server.socket)
        await wait_devices(guest, 2)

    in_lab(linux(spare_ports=1, memory_bytes=MIB), scenario, stock(UNPATCHED, "type1"))


def test_a_sandboxed_qemu_works_as_well(
    in_lab: Callable[..., Any], options: Callable[..., MigrateOptions]
) -> None:
    """What seccomp takes away, the library does not need. QEMU 10.2 is built without it."""
    strict = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    chosen = replace(moving(options), qemu_extra=("-sandbox", strict))
    assert in_lab(chosen, moved_whole, stock(TRIXIE, "iommufd-cdev", "private")) == [0]


def test_a_qemu_that_becomes_a_daemon_keeps_its_device(serve: ServerFactory, tmp_path: Path) -> None:
    """It forks before it binds the device that it was given by descriptor."""
    server = serve()
    machine = ["-nodefaults", "-display", "none", "-accel", "qtest", "-machine", "q35", "-m", "32M"]
    device = ["-object", "iommufd,id=iommufd0,fd=100", "-device", "vfio-pci,id=vfu0,iommufd=iommufd0,fd=101"]
    monitor = tmp_path / "qmp"
    daemon = ["-daemonize", "-pidfile", str(tmp_path / "pid"), "-qmp", f"unix:{monitor},server=on,wait=off"]
    firmware = [word for folder in firmware_dirs() for word in ("-L", str(folder))]
    argv = [str(artifact(UNPATCHED)), *firmware, *machine, *device, *daemon]
    done = run_preloaded(argv, [str(server.socket)], variant="plain", fds=True)
    assert done.returncode == 0, done.stderr
    pid = int((tmp_path / "pid").read_text())
    try:
        assert server.status()["connected"]
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not server.status()["connected"], "the daemon has ended")
