"""Which front end and IOMMU path a QEMU gets, and what it is started with for them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from vfu_dev.attach.front_end import (
    VfioPci,
    VfioUserPci,
    choose_front_end,
    choose_iommu,
    make_front_end,
    preload_for,
)
from vfu_dev.attach.preload import AttachError, Preload, sysfs_folder
from vfu_dev.builds.qemu_binary import QemuBinary, QemuBinaryError

EVERY_PATH = ("iommufd-fd", "iommufd-cdev", "type1")


def binary(front_ends: dict[str, bool], version: str = "11.1.3", problem: str = "") -> QemuBinary:
    """Return what probing a QEMU says."""
    return QemuBinary(Path("/q"), version, (), front_ends, EVERY_PATH, qtest=True, preload_problem=problem)


@pytest.mark.parametrize(
    ("front_ends", "chosen"),
    [
        ({"vfio-user-pci": True, "vfio-pci": True}, "vfio-user-pci"),
        ({"vfio-user-pci": False, "vfio-pci": True}, "vfio-pci"),
        ({"vfio-pci": True}, "vfio-pci"),
        ({"vfio-user-pci": False}, "vfio-user-pci"),
    ],
)
def test_the_default_is_what_migrates(front_ends: dict[str, bool], chosen: str) -> None:
    """The project's own if both do; one that only attaches if there is nothing else."""
    assert choose_front_end(binary(front_ends)) == chosen


def test_what_a_qemu_cannot_do_is_refused_in_words() -> None:
    """Asked for or not."""
    with pytest.raises(QemuBinaryError, match="has no vfio-user-pci"):
        choose_front_end(binary({"vfio-pci": True}), "vfio-user-pci")
    with pytest.raises(QemuBinaryError, match=r"needs 10\.0 or newer"):
        choose_front_end(binary({"vfio-pci": True}, "8.2.2"))
    with pytest.raises(QemuBinaryError, match="is linked statically"):
        choose_front_end(binary({"vfio-pci": True}, problem="is linked statically"))
    with pytest.raises(AttachError, match="has no iommufd-fd; its IOMMU paths: type1"):
        choose_iommu(replace(binary({"vfio-pci": True}), iommu_paths=("type1",)), "iommufd-fd")
    with pytest.raises(AttachError, match="vfio-user-pci has no IOMMU paths"):
        make_front_end(binary({"vfio-user-pci": True}), iommu="type1")


def test_a_qemu_that_blocks_cpr_properly_is_made_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """10.2 would end; and whoever says otherwise is heard."""
    preload = Preload(Path("/x.so"), variables={"DMA": "message"})
    for version, expected in (("10.2.2", {}), ("11.1.3", {"CPR": "refuse"})):
        found = preload_for(binary({}, version), preload)
        assert found.variables == {"DMA": "message"} | expected
    monkeypatch.setenv("VFU_DEV_PRELOAD_CPR", "late")
    assert "CPR" not in preload_for(binary({}, "11.1.3"), preload).variables
    sanitized = replace(binary({}), preload_first="libasan.so.8")
    assert preload_for(sanitized, preload).environment([])["LD_PRELOAD"] == "libasan.so.8 /x.so"


def test_the_first_path_that_it_has_is_taken() -> None:
    assert choose_iommu(binary({})) == "iommufd-cdev"
    assert choose_iommu(replace(binary({}), iommu_paths=("type1",))) == "type1"


def test_vfio_user_pci_has_its_socket_and_nothing_else() -> None:
    front_end = VfioUserPci()
    socket = {"type": "unix", "path": "/s"}
    assert front_end.device(0, Path("/s")) == {"driver": "vfio-user-pci", "socket": socket}
    assert (front_end.objects(), front_end.environment([Path("/s")]), front_end.descriptors) == ([], {}, ())


@pytest.mark.parametrize("iommu", ["iommufd-cdev", "type1"])
def test_a_device_is_found_by_its_folder(iommu: str, tmp_path: Path) -> None:
    """Beside its socket, with the number that the library gives it."""
    front_end = VfioPci(iommu, Preload(Path("/x.so")))
    socket = tmp_path / "a.sock"
    device = front_end.device(3, socket)
    assert device["sysfsdev"] == str(sysfs_folder(socket))
    assert ("iommufd" in device) == (iommu != "type1") == bool(front_end.objects())
    assert (sysfs_folder(socket) / "vfio-dev/vfio-user3/dev").exists()


def test_descriptors_are_open_until_they_are_closed() -> None:
    """On /dev/null, one for /dev/iommu and one for each device; QEMU is told the numbers it inherits."""
    front_end = VfioPci.inheriting("iommufd-fd", Preload(Path("/x.so")), devices=2)
    iommufd, first, second = front_end.descriptors
    assert all(
        os.path.samestat(os.fstat(number), os.stat("/dev/null")) for number in (iommufd, first, second)
    )
    assert front_end.objects()[0]["fd"] == str(iommufd)
    assert [front_end.device(number, Path("/s"))["fd"] for number in (0, 1)] == [str(first), str(second)]
    environment = front_end.environment([Path("/s"), Path("/t")])
    assert environment["VFU_DEV_PRELOAD_IOMMUFD"] == str(iommufd)
    assert environment["VFU_DEV_PRELOAD_FD1"] == str(second)
    front_end.close()
    front_end.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
