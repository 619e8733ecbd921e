"""The guest's image: an archive that other tools read, and modules in an order in which they load."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from vfu_dev.builds.guest import _modules
from vfu_dev.builds.initramfs import Initramfs
from vfu_dev.builds.pciutils import reduced_ids
from vfu_dev.errors import BuildError


def image(path: Path) -> Path:
    archive = Initramfs()
    archive.folder("bin")
    archive.file("bin/tool", b"#!/bin/sh\necho odd", executable=True)
    archive.file("empty", b"")
    archive.link("bin/alias", "tool")
    archive.character_device("null", 1, 3)
    archive.write(path)
    return path


@pytest.mark.skipif(not shutil.which("cpio"), reason="needs cpio")
def test_cpio_reads_the_archive_back(tmp_path: Path) -> None:
    data = gzip.decompress(image(tmp_path / "image.gz").read_bytes())
    listing = subprocess.run(["cpio", "-tv"], input=data, capture_output=True, check=True).stdout.decode()
    rows = {row.partition(" -> ")[0].split()[-1]: row.split() for row in listing.splitlines()}
    assert rows["bin"][0] == "drwxr-xr-x"
    assert rows["bin/tool"][0] == "-rwxr-xr-x"
    assert rows["null"][0] == "crw-------"
    assert rows["bin/alias"][-1] == "tool"

    subprocess.run(
        ["cpio", "-id", "bin/*", "empty"], input=data, cwd=tmp_path, capture_output=True, check=True
    )
    assert (tmp_path / "bin" / "alias").read_bytes() == b"#!/bin/sh\necho odd"
    assert (tmp_path / "empty").read_bytes() == b""


def test_the_same_files_give_the_same_archive(tmp_path: Path) -> None:
    assert image(tmp_path / "one.gz").read_bytes() == image(tmp_path / "other.gz").read_bytes()


def write_module(folder: Path, name: str, depends: str, *, compressed: bool = False) -> None:
    data = b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
    if compressed:
        (folder / f"{name}.ko.xz").write_bytes(lzma.compress(data))
    else:
        (folder / f"{name}.ko").write_bytes(data)


def test_modules_come_with_what_they_depend_on_in_loading_order(tmp_path: Path) -> None:
    write_module(tmp_path, "virtio-pci", "virtio_ring,virtio", compressed=True)
    write_module(tmp_path, "virtio_ring", "virtio")
    write_module(tmp_path, "virtio", "")
    write_module(tmp_path, "unwanted", "virtio")
    wanted = tmp_path / "modules.txt"
    wanted.write_text("# for the console\nvirtio_pci  # with a dash in its file name\n\nvirtio\n")
    folder = tmp_path / "modules"
    folder.mkdir()
    for path in tmp_path.glob("*.ko*"):
        path.rename(folder / path.name)
    found = _modules(wanted, folder)
    assert list(found) == ["virtio", "virtio_ring", "virtio_pci"]
    assert found["virtio_pci"].startswith(b"\x7fELF"), "a compressed module is not for busybox's insmod"

    wanted.write_text("vfoi\n")
    with pytest.raises(BuildError, match="has no module vfoi"):
        _modules(wanted, folder)
    assert _modules(tmp_path / "absent", folder) == {}


def test_the_list_of_ids_keeps_classes_and_qemus_vendors() -> None:
    ours = [
        "1b36  Red Hat, Inc.",
        "\t000c  Root port",
        "\t\t1af4 1100  Machine",
        "C 08  Generic system peripheral",
        "\t80  System peripheral",
    ]
    others = ["8086  Intel", "\t0001  Thing", "", "# classes"]
    whole = ["# a comment", "", "1b35  Other", "\t0001  Card", *ours[:3], *others, *ours[3:]]
    assert reduced_ids("\n".join(whole)) == "\n".join(ours) + "\n"
