"""`vfu-dev attach` with real QEMUs: the device is there on every IOMMU path, and what cannot work is said."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serverkit import VFU_DEV, RunningServer, ServerFactory

from vfu_dev.attach.front_end import IOMMU_PATHS
from vfu_dev.builds import artifact, firmware_dirs
from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.builds.qemu_packages import SUITES
from vfu_dev.errors import BuildError
from vfu_dev.uapi import VFIO_PCI_CONFIG_REGION_INDEX

SHARED = ("-machine", "q35,memory-backend=ram0", "-object", "memory-backend-memfd,id=ram0,size=64M,share=on")
MACHINE = ("-nodefaults", "-display", "none", "-m", "64M", "-qmp", "stdio")
ASK = '{"execute": "qmp_capabilities"} {"execute": "query-pci"} {"execute": "quit"}'

Attach = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def attach(preload: Path) -> Attach:
    """Run `vfu-dev attach`, and ask the QEMU that it becomes what is on its PCI bus."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"VFU_DEV_VFIO_PRELOAD": str(preload)}
        command = [*VFU_DEV, "attach", *words]
        return subprocess.run(command, env=env, input=ASK, capture_output=True, text=True, timeout=120)

    return run


def devices(output: str) -> list[dict[str, Any]]:
    """Return what query-pci answered about devices whose id is not empty."""
    replies = [json.loads(line) for line in output.splitlines()]
    buses = next(reply["return"] for reply in replies if reply.get("return"))
    return [device for bus in buses for device in bus["devices"] if device["qdev_id"]]


def device_ids(server: RunningServer) -> dict[str, int]:
    """Return what the device says of itself, read from its config space."""
    with server.connect() as client:
        ids = client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, 4)
    return {"vendor": int.from_bytes(ids[:2], "little"), "device": int.from_bytes(ids[2:], "little")}


@pytest.mark.parametrize("iommu", IOMMU_PATHS)
@pytest.mark.parametrize("suite", [suite.name for suite in SUITES])
def test_the_device_is_on_the_bus(
    suite: str, iommu: str, stock_qemu: Callable[[str], QemuBinary], serve: ServerFactory, attach: Attach
) -> None:
    """Appended, both devices with the identity that their servers gave them; and nothing is said."""
    servers = [serve("--require-migration"), serve()]
    expected = [device_ids(server) for server in servers]
    sockets = [server.socket for server in servers]
    done = attach(*sockets, "--iommu", iommu, "--", stock_qemu(suite).path, *SHARED, *MACHINE)
    assert done.returncode == 0, done.stderr
    found = sorted(devices(done.stdout), key=lambda device: str(device["qdev_id"]))
    assert [device["qdev_id"] for device in found] == ["vfu0", "vfu1"]
    assert [{key: device["id"][key] for key in ("vendor", "device")} for device in found] == expected
    assert done.stderr == ""


def test_a_qemu_with_the_address_sanitizer_has_the_device(serve: ServerFactory, attach: Attach) -> None:
    """As developers build their trees: the sanitizer's library is preloaded before ours."""
    server = serve()
    try:
        qemu = artifact("qemu-asan")
    except BuildError as error:
        pytest.skip(str(error))
    firmware = [word for folder in firmware_dirs() for word in ("-L", str(folder))]
    done = attach(server.socket, "--iommu", "iommufd-cdev", "--", qemu, *firmware, *SHARED, *MACHINE)
    assert done.returncode == 0, done.stderr
    assert [device["qdev_id"] for device in devices(done.stdout)] == ["vfu0"]
    assert "AddressSanitizer" not in done.stderr


def test_a_placeholder_is_replaced_and_nothing_appended(
    stock_qemu: Callable[[str], QemuBinary], serve: ServerFactory, attach: Attach
) -> None:
    """Behind a program that starts QEMU; RAM that is not shared works, and is said."""
    server = serve()
    qemu = stock_qemu(SUITES[-1].name).path
    device = "vfio-pci,id=mine,addr=0x7,sysfsdev=%sysfsdev0%"
    done = attach(server.socket, "--iommu", "type1", "--", "nice", qemu, *MACHINE, "-device", device)
    assert done.returncode == 0, done.stderr
    (found,) = devices(done.stdout)
    assert (found["qdev_id"], found["slot"]) == ("mine", 7)
    assert "guest RAM is not shared: all DMA of the device goes by message" in done.stderr


@pytest.mark.parametrize("iommu", ["iommufd-fd", "iommufd-cdev"])
def test_the_printed_line_does_the_same(
    iommu: str, stock_qemu: Callable[[str], QemuBinary], serve: ServerFactory, attach: Attach
) -> None:
    """Pasted into a shell, later, from another folder."""
    server = serve()
    command = (stock_qemu(SUITES[-1].name).path, *SHARED, *MACHINE)
    printed = attach(server.socket, "--iommu", iommu, "--print", "--", *command).stdout
    done = subprocess.run(
        ["sh", "-c", printed], cwd="/", input=ASK, capture_output=True, text=True, timeout=120, check=True
    )
    assert [device["qdev_id"] for device in devices(done.stdout)] == ["vfu0"]


def test_a_server_that_is_not_there_is_said_before_qemu_starts(
    stock_qemu: Callable[[str], QemuBinary], tmp_path: Path, attach: Attach
) -> None:
    qemu = stock_qemu(SUITES[-1].name).path
    missing = tmp_path / "a.sock"
    done = attach(missing, "--", qemu, *MACHINE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"vfu-dev: {missing}: no such socket; start a server: vfu-dev serve --socket {missing}"
    )
    missing.write_text("")
    assert "is not a socket" in attach(missing, "--", qemu, *MACHINE).stderr


def test_a_qemu_that_cannot_do_it_says_why(tmp_path: Path, attach: Attach) -> None:
    """One without vfio-pci, and one that loses guest memory."""
    for version, properties, why in (
        ("11.1.3", "", "has no vfio-pci"),
        ("8.2.2", "  sysfsdev=<str>", "vfio-pci needs 10.0 or newer here"),
    ):
        qemu = tmp_path / version / "qemu-system-x86_64"
        qemu.parent.mkdir()
        cases = f'*--version*) echo "QEMU emulator version {version}";; *vfio-pci*) echo "{properties}";;'
        qemu.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
        qemu.chmod(0o755)
        done = attach(tmp_path / "a.sock", "--", qemu)
        assert done.returncode == 1
        assert why in done.stderr
