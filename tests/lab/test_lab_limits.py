"""What VFIO in QEMU does not have, and what it does with it here: vIOMMU, virtio-mem, CPR, in three versions.

Each is supported, or refused by QEMU itself with a reason, before anything is lost
(native/vfio-preload/README.md, "What it refuses").
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from itinerary import QEMUS
from labkit import MIB, PRELOAD_PATIENT, dirtying
from serverkit import PATIENCE_SECONDS, VFU_DEV, ServerFactory, wait_until

from vfu_dev.builds.cache import Cache
from vfu_dev.builds.guest import BASE, kernel_modules
from vfu_dev.builds.initramfs import Initramfs
from vfu_dev.builds.qemu_binary import find_qemu
from vfu_dev.client.listening import is_listening
from vfu_dev.errors import BuildError
from vfu_dev.lab.host import Host
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.guest import LinuxGuest

VIOMMU = "intel-iommu,caching-mode=on"
APPENDED = "console=ttyS0 quiet panic=-1 init_on_free=1 no_timer_check"


def program(version: str) -> tuple[Path, list[str]]:
    """Return the QEMU of that version, with its firmware's folders."""
    try:
        found = find_qemu(QEMUS[version])
    except BuildError as error:
        pytest.skip(str(error))
    return found.path, [word for folder in found.firmware for word in ("-L", str(folder))]


class Monitored:
    """A QEMU that `vfu-dev attach` started, stopped before its first instruction, and its monitor.

    All of its memory may be handed on, so that QEMU's own memory is no reason against CPR.
    """

    def __init__(self, version: str, iommu: str, socket: Path, *extra: str) -> None:
        path, firmware = program(version)
        ram = "memory-backend-memfd,id=ram0,size=64M,share=on"
        machine = ("-machine", "q35,memory-backend=ram0,aux-ram-share=on", "-object", ram, "-m", "64M")
        quiet = ("-nodefaults", "-display", "none", "-qmp", "stdio", "-S")
        argv = [*VFU_DEV, "attach", socket, "--iommu", iommu, "--", path, *firmware, *machine, *quiet, *extra]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = os.environ | dict(PRELOAD_PATIENT)
        self.process = subprocess.Popen(argv, text=True, env=environment, **pipes)

    def __enter__(self) -> Monitored:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return what QEMU answers: an object with `return` or `error`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments}))
        self.process.stdin.flush()
        for line in self.process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if answer.keys() & {"return", "error"}:
                return answer
        pytest.fail(f"QEMU ended: {self.process.wait()} {self.process.communicate()[1]}")

    def ended(self) -> dict[str, Any]:
        """Wait for the end of the migration; return what `query-migrate` says then."""
        while (reply := self.ask("query-migrate")["return"]).get("status") in ("setup", "active", "device"):
            pass
        return dict(reply)


@pytest.mark.parametrize(
    ("version", "iommu"), [("10.0", "type1"), ("10.2", "iommufd-cdev"), ("11.1", "iommufd-cdev")]
)
def test_with_a_viommu_qemu_blocks_migration(
    version: str, iommu: str, serve: ServerFactory, preload: Path, tmp_path: Path
) -> None:
    with Monitored(version, iommu, serve().socket, "-device", VIOMMU) as qemu:
        qemu.ask("qmp_capabilities")
        (reason,) = qemu.ask("query-migrate")["return"]["blocked-reasons"]
        assert "Migration is currently not supported with vIOMMU enabled" in reason
        assert qemu.ask("migrate", uri=f"file:{tmp_path / 'vm.state'}")["error"]["desc"] == reason


@pytest.mark.parametrize("version", QEMUS)
def test_11_1_alone_asks_to_be_told_of_initial_data_that_appears(
    version: str, serve: ServerFactory, preload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for a `no` in docs/qemu-versions.md, when the device is realized by vfio-pci."""
    log = tmp_path / "asked"
    monkeypatch.setenv("VFU_DEV_PRELOAD_LOG", str(log))
    with Monitored(version, "iommufd-cdev", serve().socket) as qemu:
        qemu.ask("qmp_capabilities")
        said = log.read_text()
        assert "feature 1 GET: ok" in said, "migration was asked for, so the log is what it is taken for"
        assert ("feature 12 SET" in said) == (version == "11.1")


def test_our_vfio_user_pci_refuses_multifd_in_words(serve: ServerFactory, qemu: Path) -> None:
    """Another one."""
    server = serve()
    found = find_qemu(str(qemu))
    device = {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": str(server.socket)},
        "x-migration-multifd-transfer": "on",
    }
    firmware = [word for folder in found.firmware for word in ("-L", str(folder))]
    argv = [found.path, *firmware, "-machine", "q35", "-nodefaults", "-display", "none", "-S"]
    done = subprocess.run(
        [*argv, "-device", json.dumps(device)], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 1
    assert "x-migration-multifd-transfer=on is not possible with vfio-user" in done.stderr


CPR = [
    ("10.2", "type1", "blocked", "VFIO container does not support VFIO_UPDATE_VADDR"),
    ("11.1", "type1", "blocked", "VFIO container does not support VFIO_UPDATE_VADDR"),
    ("11.1", "iommufd-cdev", "blocked", "vfio iommufd backend does not support IOMMU_IOAS_CHANGE_PROCESS"),
    # 10.2 has that blocker too, but dies of SIGSEGV when it adds it: CPR is refused when its state is saved.
    ("10.2", "iommufd-cdev", "failed", "Save of field CprState/fds failed"),
    # Its VFIO knows nothing of the mode: it migrates as in any other.
    ("10.0", "type1", "completed", ""),
]


@pytest.mark.parametrize(("version", "iommu", "outcome", "reason"), CPR)
def test_cpr_transfer_is_refused_or_is_a_migration(
    version: str,
    iommu: str,
    outcome: str,
    reason: str,
    serve: ServerFactory,
    preload: Path,
    short_tmp: Path,
) -> None:
    """A made-up device cannot be handed to another process; the VM stays as it is."""
    channels = [
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(short_tmp / kind)}}
        for kind in ("main", "cpr")
    ]
    incoming = [word for channel in channels for word in ("-incoming", json.dumps(channel))]
    servers = [serve(), serve()]
    with (
        Monitored(version, iommu, servers[0].socket) as source,
        Monitored(version, iommu, servers[1].socket, *incoming),
    ):
        wait_until(lambda: is_listening(short_tmp / "cpr"), "the destination listens")
        source.ask("qmp_capabilities")
        assert source.ask("migrate-set-parameters", mode="cpr-transfer")["return"] == {}
        answer = source.ask("migrate", channels=channels)
        if outcome == "blocked":
            assert answer["error"]["desc"] == reason
            assert source.ask("query-migrate")["return"]["blocked-reasons"] == [reason]
        else:
            reply = source.ended()
            assert (reply["status"], reply.get("error-desc", "")) == (outcome, reason)
        if outcome != "completed":
            assert source.ask("query-status")["return"]["status"] == "prelaunch"
            assert servers[0].status()["state"] == "RUNNING"


@pytest.mark.parametrize("version", ["10.0", "10.2", "11.1"])
def test_cpr_reboot_wants_a_suspended_guest(
    version: str, serve: ServerFactory, preload: Path, tmp_path: Path
) -> None:
    """That is QEMU's own rule."""
    with Monitored(version, "iommufd-cdev", serve().socket) as qemu:
        qemu.ask("qmp_capabilities")
        qemu.ask("migrate-set-parameters", mode="cpr-reboot")
        qemu.ask("migrate", uri=f"file:{tmp_path / 'vm.state'}")
        assert qemu.ended()["error-desc"] == "VFIO device only supports cpr-reboot for runstate suspended"


# --- with a Linux guest -------------------------------------------------------------------------------------


@pytest.fixture
def linux(library: Path, guest_image: Path, preload: Path) -> Callable[..., MigrateOptions]:
    """Make options for a Linux guest and a QEMU of that version."""

    def make(version: str, iommu: str, *extra: str, guest: Path = guest_image) -> MigrateOptions:
        return MigrateOptions(
            qemu=program(version)[0],
            front_end="vfio-pci",
            iommu=iommu,
            library=library,
            guest_image=guest,
            memory_bytes=MIB,
            load=dirtying(0),
            preload_log=True,
            qemu_environment=PRELOAD_PATIENT,
            qemu_extra=extra,
        )

    return make


def in_guest(
    options: MigrateOptions,
    logs: Path,
    change: Callable[[list[str]], None],
    scenario: Callable[[Host, LinuxGuest], Awaitable[None]],
) -> None:
    """Run a scenario in a VM that is not migrated; `change` its command line before."""

    async def whole() -> None:
        async with Lab(options, logs) as lab:
            change(lab.source.qemu.process.argv)
            await lab.source.start()
            await lab.guest.ready(lab.source.qemu)
            assert isinstance(lab.guest, LinuxGuest)
            await scenario(lab.source, lab.guest)

    asyncio.run(whole())


def mappings(host: Host) -> list[tuple[str, int, int]]:
    """Return what was mapped and unmapped, in order: which of them, address, bytes."""
    assert host.qemu.preload_log is not None
    said = host.qemu.preload_log.read_text()
    found = re.findall(r"DMA_(MAP|UNMAP) \[(0x\w+), \+(0x\w+)\).*: ok", said)
    return [(what, int(start, 16), int(size, 16)) for what, start, size in found]


def test_a_guest_that_programs_a_viommu_has_its_dma(
    linux: Callable[..., MigrateOptions], tmp_path: Path
) -> None:
    """Linux maps each buffer for the device, page by page; transfers, stamps and interrupts are right."""

    def change(argv: list[str]) -> None:
        at = argv.index("-device")  # it has to be there before any device that it is for
        argv[at:at] = ["-device", VIOMMU]

    async def scenario(host: Host, guest: LinuxGuest) -> None:
        before = len(mappings(host))
        assert (await guest.command("irq mode=msix"))["vectors"] == 4
        assert (await guest.command(f"writer buffer=65536 rate={16 * MIB}"))["ok"]
        await guest.command(f"dma rate={8 * MIB} vector=1")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await guest.command("dma-status"))["batches"] < 20:
                await asyncio.sleep(0.02)
        stamps, batches = await guest.command("writer-check"), await guest.command("dma-stop")
        assert (stamps["wrong_bytes"], stamps["status"]) == (0, 1)
        assert (batches["errors"], batches["mismatched_bytes"], batches["lost_interrupts"]) == (0, 0, 0)
        made = mappings(host)[before:]
        assert sum(size for what, _, size in made if what == "MAP") >= 65536
        assert {size for what, _, size in made if what == "MAP"} == {4096}

    options = linux("11.1", "type1", "-append", f"{APPENDED} intel_iommu=on iommu.strict=1")
    in_guest(options, tmp_path / "logs", change, scenario)


def with_virtio_mem(base: Path, folder: Path) -> Path:
    """Return a guest whose init loads virtio-mem as well: a second archive behind its initramfs."""
    (folder / "wanted").write_text("virtio_pci\nvirtio_mem\n")
    modules = kernel_modules(folder / "wanted", BASE.folder(Cache()) / "modules")
    archive = Initramfs()
    for name, data in modules.items():
        archive.file(f"lib/modules/{name}.ko", data)
    order = "".join(f"/lib/modules/{name}.ko\n" for name in (*modules, "vfud"))
    archive.file("etc/modules.order", order.encode())
    archive.write(folder / "second")
    both = (base / "initramfs.cpio.gz").read_bytes() + (folder / "second").read_bytes()
    (folder / "initramfs.cpio.gz").write_bytes(both)
    (folder / "vmlinuz").symlink_to(base / "vmlinuz")
    return folder


@pytest.mark.parametrize(("version", "iommu"), [("10.2", "iommufd-cdev"), ("10.0", "type1")])
def test_memory_that_virtio_mem_plugs_is_mapped_and_what_it_takes_is_not(
    version: str, iommu: str, linux: Callable[..., MigrateOptions], guest_image: Path, tmp_path: Path
) -> None:
    """128 MiB come and go, by descriptor. Migration: QEMU aborts under TCG with virtio-mem, VFIO or not."""
    size, place = 128 * MIB, 1 << 32

    def change(argv: list[str]) -> None:
        at = argv.index("-m") + 1
        argv[at] += ",maxmem=4G,slots=4"

    async def scenario(host: Host, guest: LinuxGuest) -> None:
        async def plugged(wanted: int) -> None:
            path = "/machine/peripheral/vmem0"
            await host.qemu.execute("qom-set", path=path, property="requested-size", value=wanted)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await host.qemu.execute("qom-get", path=path, property="size") != wanted:
                    await asyncio.sleep(0.05)

        def mapped() -> int:
            signs = {"MAP": 1, "UNMAP": -1}
            return sum(signs[what] * bytes_ for what, start, bytes_ in mappings(host) if start >= place)

        assert mapped() == 0
        await plugged(size)
        assert mapped() == size
        await plugged(0)
        assert mapped() == 0

    folder = tmp_path / "guest"
    folder.mkdir()
    extra = (
        *("-append", f"{APPENDED} memhp_default_state=online_movable"),
        *("-object", "memory-backend-memfd,id=plugged,size=512M,share=on"),
        *("-device", "virtio-mem-pci,id=vmem0,memdev=plugged,requested-size=0,bus=pcie.0,addr=0x9"),
    )
    options = linux(version, iommu, *extra, guest=with_virtio_mem(guest_image, folder))
    in_guest(options, tmp_path / "logs", change, scenario)
