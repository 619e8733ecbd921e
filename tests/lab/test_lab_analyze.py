"""`scripts/analyze-migration.py` of QEMU with our patch, on files that QEMUs with the device wrote."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from labkit import MIB
from serverkit import PATIENCE_SECONDS, ServerFactory
from test_lab_limits import Monitored

from vfu_dev.builds import Cache, native_dir
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.fetch import unpacked
from vfu_dev.builds.progress import Reporter
from vfu_dev.device.reference.layout import DEVICE_ID, VENDOR_ID
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.migration.stream import MAGIC

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]
SCRIPT = "scripts/analyze-migration.py"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The script of the pinned source as it is, and with the patch of the series."""
    folder = tmp_path_factory.mktemp("analyze")
    tree = unpacked(BuildContext(Cache(), Reporter(), folder / "log", jobs=1))
    (patch,) = [path for path in (native_dir() / "qemu").glob("*.patch") if SCRIPT in path.read_text()]
    both = folder / "pinned", folder / "patched"
    for copy in both:
        (copy / "scripts").mkdir(parents=True)
        shutil.copy(tree / SCRIPT, copy / SCRIPT)
    subprocess.run(
        ["patch", "-p1", "--fuzz=0", "--batch", "-i", patch],
        cwd=both[1],
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    return both[0] / SCRIPT, both[1] / SCRIPT


def analyze(script: Path, file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script; what it extracts is in the file's folder."""
    command = [sys.executable, script, "-f", file, *arguments]
    return subprocess.run(
        command, cwd=file.parent, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def check(sent: list[tuple[int, int]], scripts: tuple[Path, Path], file: Path) -> None:
    """Compare what the script says of each device with the bytes sent: in PRE_COPY, in STOP_COPY."""
    pinned, patched = scripts
    done = analyze(patched, file)
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads(done.stdout)
    assert any(name.startswith("globalstate ") for name in state), "not read up to the last section"
    unpatched = analyze(pinned, file)
    lost = unpatched.returncode != 0 or len(json.loads(unpatched.stdout)) < len(state)
    assert lost, "the script reads such files without the patch: drop it"
    sections = {
        name.split("/")[0]: entry for name, entry in state.items() if re.search(r"/vfio \(\d+\)$", name)
    }
    assert len(sections) == len(sent)
    extracted = analyze(patched, file, "-x")
    assert extracted.returncode == 0, extracted.stderr[-2000:]
    for sizes, (address, section) in zip(sent, sorted(sections.items()), strict=True):
        assert (int(section["precopy data"], 16), int(section["stop-copy data"], 16)) == sizes
        assert sizes[0] >= MIB
        assert sizes[1] > 0
        assert section["data records"] > 1
        config = bytes.fromhex(section["config"])
        assert struct.unpack_from("<HH", config) == (VENDOR_ID, DEVICE_ID)
        stream = (file.parent / address / "vfio").read_bytes()
        assert len(stream) == sum(sizes)
        assert stream.startswith(MAGIC)


def test_two_devices_behind_vfio_user_pci(
    options: Options, in_lab: InLab, scripts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Sizes are those that the servers counted, of each device its own; config space is the device's."""
    file = tmp_path / "vm.state"

    async def scenario(lab: Lab) -> list[tuple[int, int]]:
        await lab.configure(return_path=False)
        await lab.begin(f"file:{file}")
        assert (await lab.wait_final())["status"] == "completed"
        result = MigrationResult()
        await lab.collect(result)
        return [(device.precopy_bytes, device.stop_copy_bytes) for device in result.devices]

    check(in_lab(options(devices=2), scenario), scripts, file)


@pytest.mark.parametrize(("version", "iommu"), [("10.0", "type1"), ("11.1", "iommufd-cdev")])
def test_a_device_behind_an_unmodified_vfio_pci(
    version: str, iommu: str, serve: ServerFactory, preload: Path, scripts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same of files that Debian's QEMUs wrote."""
    file = tmp_path / "vm.state"
    server = serve("--fill", "1")
    with Monitored(version, iommu, server.socket) as qemu:
        qemu.ask("qmp_capabilities")
        qemu.ask("migrate", uri=f"file:{file}")
        assert qemu.ended()["status"] == "completed"
        save = server.status()["save"]
    check([(save["precopy_bytes"], save["stop_copy_bytes"])], scripts, file)
