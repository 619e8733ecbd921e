"""Debian's own QEMUs: both start, have the machine and the devices that they should, and can be preloaded."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from labkit import halting_guest

from vfu_dev.builds import firmware_dirs, recipe_named
from vfu_dev.builds.cache import Cache
from vfu_dev.builds.making import damage
from vfu_dev.builds.qemu_binary import QemuBinary, find_qemu
from vfu_dev.builds.qemu_packages import SUITES, Suite
from vfu_dev.vm.kvm_trial import try_kvm
from vfu_dev.vm.qemu import Qemu, QemuOptions

# Booting under TCG on a loaded machine; ten times what it took there.
BOOT_SECONDS = 120.0

PRELOAD = r"""
#include <stdio.h>
__attribute__((constructor)) static void note(void)
{
    char name[32] = "";
    FILE *file = fopen("/proc/self/comm", "r");
    if (file && fgets(name, sizeof name, file))
        fprintf(stderr, "preloaded into %s", name);
}
"""

StockQemu = Callable[[str], QemuBinary]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(params=SUITES, ids=lambda suite: suite.name)
def suite(request: pytest.FixtureRequest) -> Suite:
    """Each suite in turn."""
    found: Suite = request.param
    return found


@pytest.fixture
def stock(suite: Suite, stock_qemu: StockQemu) -> QemuBinary:
    """Its QEMU."""
    return stock_qemu(suite.name)


def test_starts_and_knows_the_machine_and_the_devices(stock: QemuBinary, suite: Suite) -> None:
    """Asked of the program itself, with nothing but its own loader and libraries."""
    assert stock.release >= suite.known
    assert "q35" in _run(stock.path, "-machine", "help")
    properties = _run(stock.path, "-device", "vfio-pci,help")
    assert all(f"  {name}=" in properties for name in ("sysfsdev", "iommufd", "fd", "enable-migration"))
    assert stock.front_ends["vfio-pci"]
    assert stock.iommu_paths == ("iommufd-fd", "iommufd-cdev", "type1")
    assert not stock.migration, "no released QEMU migrates a vfio-user device"
    assert stock.firmware == (), "it has its own, and finds it"
    assert stock.problem("vfio-pci") == ""


def test_nothing_in_the_cache_was_changed_since_it_was_unpacked(stock: QemuBinary, suite: Suite) -> None:
    assert damage(recipe_named(f"qemu-{suite.name}").folder(Cache())) == []


def test_its_libraries_are_its_own(stock: QemuBinary) -> None:
    """Not one of this machine's libraries is in the process, its libc and loader included."""
    root = stock.path.parent
    loader = root / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    listed = _run(loader, "--library-path", loader.parent, "--list", root / "usr/bin/qemu-system-x86_64")
    paths = [line.split(" => ")[-1].split(" (")[0].strip() for line in listed.splitlines()]
    files = [path for path in paths if path.startswith("/")]
    assert len(files) > 20
    foreign = [path for path in files if not path.startswith(str(root)) and "ld-linux" not in path]
    assert foreign == []


def test_a_monitor_answers_and_children_of_a_preloaded_qemu_run(stock: QemuBinary, tmp_path: Path) -> None:
    """QMP's handshake; then `exec:` starts this machine's shell, the library preloaded into it as well."""
    library = tmp_path / "preload.so"
    command = ["cc", "-x", "c", "-", "-shared", "-fPIC", "-o", library]
    subprocess.run(command, input=PRELOAD.encode(), check=True, capture_output=True)

    async def scenario() -> int | None:
        machine = ("-machine", "q35", "-accel", "tcg", "-S")
        # Not the lab's command line, with a guest or without one.
        options = QemuOptions(stock.path, 64 << 20, guest=tmp_path)
        qemu = Qemu("stock", tmp_path, tmp_path, options, [])
        qemu.process.argv = [
            *("env", f"LD_PRELOAD={library}", str(stock.path), *machine),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-qmp", f"unix:{qemu.qmp_socket},server=on,wait=off"),
        ]
        await qemu.start()
        try:
            version = await qemu.execute("query-version")
            assert (version["qemu"]["major"], version["qemu"]["minor"]) == stock.release
            await qemu.execute("migrate", uri=f"exec:cat >{tmp_path}/vm.state")
            while (await qemu.migration())["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.05)
            assert (await qemu.migration())["status"] == "completed"
        finally:
            status = await qemu.stop()
        return status

    assert asyncio.run(scenario()) == 0
    assert (tmp_path / "vm.state").read_bytes()[:4] == b"QEVM"
    said = (tmp_path / "stock.log").read_text()
    assert "preloaded into ld-linux-x86-64" in said
    assert "preloaded into cat" in said


def test_boots_linux_with_its_own_firmware(stock: QemuBinary, guest_image: Path) -> None:
    """The trial that doctor makes under KVM, under TCG: Linux speaks."""
    trial = try_kvm(stock, guest_image, accel="tcg", limit_seconds=BOOT_SECONDS)
    assert trial.runs, trial.said


def test_a_guest_that_prints_nothing_does_not_run(qemu: Path, tmp_path: Path) -> None:
    """A kernel whose first instruction is HLT stands in for one that KVM does not run."""
    guest = halting_guest(tmp_path / "guest")
    silent = try_kvm(find_qemu(str(qemu)), guest, accel="tcg", limit_seconds=2.0)
    assert (silent.runs, silent.said) == (False, "")
    assert silent.seconds >= 2.0
    (guest / "vmlinuz").unlink()
    refused = try_kvm(find_qemu(str(qemu)), guest, accel="tcg", limit_seconds=BOOT_SECONDS)
    assert not refused.runs
    assert "vmlinuz" in refused.said


def test_a_console_without_linux_s_first_line_is_silent_under_kvm_only(qemu: Path, tmp_path: Path) -> None:
    """What the lab looks at before it names KVM as the reason."""
    machine = QemuOptions(qemu, 64 << 20, accel="kvm")
    under_kvm = Qemu("a", tmp_path, tmp_path, machine, [])
    under_tcg = Qemu("a", tmp_path, tmp_path, replace(machine, accel="tcg"), [])
    assert (under_kvm.is_silent_under_kvm(), under_tcg.is_silent_under_kvm()) == (True, False)
    under_kvm.console_log.write_text("Probing EDD (edd=off to disable)... ok\n")
    assert under_kvm.is_silent_under_kvm()
    under_kvm.console_log.write_text("[    0.000000] Linux version 6.1.0\n")
    assert not under_kvm.is_silent_under_kvm()


def test_ours_finds_the_systems_firmware(qemu: Path, unpatched: Path) -> None:
    """It is built with these folders; the unpatched one has none of its own, and is given them."""
    assert find_qemu(str(qemu)).firmware == ()
    assert list(find_qemu(str(unpatched)).firmware) == firmware_dirs()
