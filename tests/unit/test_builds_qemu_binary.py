"""Which QEMU a name or path means, and what is said of it; the programs here answer as real ones do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import debkit
import pytest

from vfu_dev.builds import qemu_binary
from vfu_dev.builds.cache import Cache
from vfu_dev.builds.packages import FIRMWARE_DIRS
from vfu_dev.builds.qemu_binary import (
    NAMES,
    QemuBinaryError,
    find_qemu,
    preload_first,
    preload_problem,
    probe_qemu,
)
from vfu_dev.builds.recipe import NotBuiltError
from vfu_dev.errors import BuildError

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc (gcc)")

VFIO_PCI_8 = "vfio-pci options:\n  enable-migration=<OnOffAuto>\n  sysfsdev=<str>"
VFIO_PCI_11 = f"{VFIO_PCI_8}\n  fd=<string>\n  iommufd=<link<iommufd>>"
VFIO_USER = "vfio-user-pci options:\n  socket=<SocketAddress>"


def program(
    path: Path,
    version: str = "11.1.3 (Debian 1:11.1.3+ds-1)",
    kernel: str = VFIO_PCI_11,
    user: str = VFIO_USER,
    objects: str = "  iommufd\n  memory-backend-memfd",
    firmware: str = "/nowhere",
    qtest: bool = True,
) -> Path:
    """Write a script that answers what is asked of a QEMU, and counts how often it was started."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
echo x >>'{path}.started'
case "$*" in
*--version*) echo 'QEMU emulator version {version}' ;;
*vfio-user-pci,help*) printf '%s\\n' '{user}' ;;
*vfio-pci,help*) printf '%s\\n' '{kernel}' ;;
*-object*) printf '%s\\n' 'List of user creatable objects:' '{objects}' ;;
*qtest*) exit {0 if qtest else 1} ;;
*-L*) echo '{firmware}' ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def test_what_a_binary_can_do_is_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/bios-256k.bin").touch()
    found = probe_qemu(program(tmp_path / "new", firmware=str(tmp_path / "blobs")))
    assert found.version == "11.1.3 (Debian 1:11.1.3+ds-1)"
    assert found.release == (11, 1)
    assert found.front_ends == {"vfio-user-pci": False, "vfio-pci": True}
    assert found.iommu_paths == ("iommufd-fd", "iommufd-cdev", "type1")
    assert found.qtest
    assert found.firmware == (), "it has a BIOS where it looks itself"
    assert found.problem("vfio-pci") == found.problem("vfio-user-pci") == ""

    old = probe_qemu(
        program(tmp_path / "old", "8.2.2", VFIO_PCI_8, "Device not found", "  can-bus", qtest=False)
    )
    assert old.front_ends == {"vfio-pci": True}
    assert old.iommu_paths == ("type1",)
    assert not old.qtest
    assert old.firmware == tuple(folder for folder in FIRMWARE_DIRS if folder.is_dir())
    with pytest.raises(QemuBinaryError, match=r"is QEMU 8\.2\.2: vfio-pci needs 10\.0 or newer.*bookworm"):
        old.require("vfio-pci")
    with pytest.raises(
        QemuBinaryError, match=r"has no vfio-user-pci \(QEMU has it since 10\.1\); it has vfio-pci"
    ):
        old.require("vfio-user-pci")

    patched = program(
        tmp_path / "patched", user=f"{VFIO_USER}\n  enable-migration=<OnOffAuto>", kernel="none"
    )
    assert probe_qemu(patched).front_ends == {"vfio-user-pci": True}
    assert probe_qemu(patched).iommu_paths == ()


def test_a_binary_is_asked_once_until_it_changes(tmp_path: Path) -> None:
    path = program(tmp_path / "qemu")
    started = tmp_path / "qemu.started"
    first = probe_qemu(path)
    count = len(started.read_text())
    assert probe_qemu(path) == first
    assert len(started.read_text()) == count
    program(path, version="11.2.0 and longer")
    assert probe_qemu(path).release == (11, 2)


def test_names_paths_and_build_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git tree, its build folder and the program are the same; what is not there is said."""
    for variable in ("VFU_DEV_QEMU", "VFU_DEV_PACKAGES"):
        monkeypatch.delenv(variable, raising=False)
    path = program(tmp_path / "tree/build/qemu-system-x86_64")
    for choice in (path, path.parent, tmp_path / "tree"):
        assert find_qemu(str(choice)).path == path
    cache = Cache(tmp_path / "cache")
    for name in NAMES:
        if name != "system":
            with pytest.raises(NotBuiltError, match="run: vfu-dev build qemu"):
                find_qemu(name, cache=cache)
    with pytest.raises(QemuBinaryError, match=f"trixie: no such QEMU.*as a name: {', '.join(NAMES)}"):
        find_qemu("trixie")
    with pytest.raises(QemuBinaryError, match=r"^~nobody-has-this-name/qemu: no such QEMU: neither file nor"):
        find_qemu("~nobody-has-this-name/qemu")
    with pytest.raises(BuildError, match=r"no qemu-system-x86_64 in it or in its build/"):
        find_qemu(str(tmp_path))
    monkeypatch.setenv("VFU_DEV_QEMU", str(path))
    with pytest.raises(NotBuiltError):
        find_qemu("patched", cache=cache)


def test_the_system_s_qemu_is_the_one_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = program(tmp_path / "qemu-system-x86_64", version="7.2.0")
    assert find_qemu("system").path == path
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(QemuBinaryError, match="there is no qemu-system-x86_64 in the PATH; install"):
        find_qemu("system")


def test_what_does_not_run_or_is_no_qemu_is_said(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text("#!/bin/sh\necho 'error while loading shared libraries: libaio.so.1' >&2\nexit 127\n")
    with pytest.raises(QemuBinaryError, match=r"does not run: .*Permission denied"):
        probe_qemu(path)
    path.chmod(0o755)
    with pytest.raises(QemuBinaryError, match=r"does not run: .*libaio\.so\.1"):
        probe_qemu(path)
    path.write_text("#!/bin/sh\necho GNU bash, version 5\n")
    with pytest.raises(QemuBinaryError, match="is not a QEMU: its --version prints 'GNU bash, version 5'"):
        probe_qemu(path)
    with pytest.raises(QemuBinaryError, match="No such file"):
        probe_qemu(tmp_path / "absent")


MAIN = "int main(void) { return 0; }"


@needs_cc
def test_what_cannot_be_preloaded_is_seen_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static, setuid, and programs with file capabilities; scripts pass it on."""
    plain = debkit.compile_c(tmp_path / "plain", MAIN)
    assert preload_problem(plain) == ""
    assert "linked statically" in preload_problem(debkit.compile_c(tmp_path / "static", MAIN, "-static"))
    asan = debkit.compile_c(tmp_path / "asan", MAIN, "-fsanitize=address")
    assert preload_problem(asan) == ""
    assert preload_first(asan).startswith("libasan.so.")
    assert preload_first(plain) == preload_first(tmp_path / "absent") == ""
    plain.chmod(0o4755)
    assert preload_problem(plain) == "", "the owner gains nothing by it"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "setuid or setgid" in preload_problem(plain)
    plain.chmod(0o755)
    assert preload_problem(plain) == ""
    if os.geteuid() == 0 and shutil.which("setcap"):
        subprocess.run(["setcap", "cap_net_admin+ep", plain], check=True)
        assert "file capabilities" in preload_problem(plain)
    script = program(tmp_path / "wrapper/qemu")
    assert preload_problem(script) == ""
    (tmp_path / "wrapper/usr/bin").mkdir(parents=True)
    debkit.compile_c(tmp_path / "wrapper/usr/bin/qemu", MAIN, "-static")
    assert "linked statically" in preload_problem(script), "what our script starts was not looked at"
    script.write_text("neither")
    assert "not an ELF file" in preload_problem(script)
    assert "cannot be read" in preload_problem(tmp_path / "absent")


def test_preload_problems_reach_whoever_wants_the_front_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_binary, "preload_problem", lambda path: "is linked statically")
    found = probe_qemu(program(tmp_path / "static"))
    assert "is linked statically, so vfio-pci cannot reach a vfio-user server" in found.problem("vfio-pci")
    assert found.problem("vfio-user-pci") == ""
