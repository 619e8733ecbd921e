"""The guest's image: an archive that other tools read, and modules in an order in which they load."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vfu_dev.builds.guest import kernel_modules
from vfu_dev.builds.guest_module import keep_headers
from vfu_dev.builds.initramfs import Initramfs
from vfu_dev.builds.native import native_dir
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
    found = kernel_modules(wanted, folder)
    assert list(found) == ["virtio", "virtio_ring", "virtio_pci"]
    assert found["virtio_pci"].startswith(b"\x7fELF"), "a compressed module is not for busybox's insmod"

    wanted.write_text("vfoi\n")
    with pytest.raises(BuildError, match="has no module vfoi"):
        kernel_modules(wanted, folder)
    assert kernel_modules(tmp_path / "absent", folder) == {}


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


def unpacked_headers(root: Path, kernel: str) -> None:
    """Lay out what Debian's three header packages bring: absolute paths, and links between them."""
    own, common = root / f"usr/src/linux-headers-{kernel}", root / "usr/src/linux-headers-1-common"
    tools = root / "usr/lib/linux-kbuild-1"
    for folder in (own, common / "arch/x86", common / "arch/arm", common / "include", tools / "scripts"):
        folder.mkdir(parents=True)
    (own / "Makefile").write_text("include /usr/src/linux-headers-1-common/Makefile\n")
    (own / "scripts").symlink_to("/usr/lib/linux-kbuild-1/scripts")
    (common / "scripts").symlink_to("../../lib/linux-kbuild-1/scripts")
    (common / "Makefile").write_text("all:\n\t@echo made in $(CURDIR)\n")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_headers_hold_together_wherever_they_are_moved(tmp_path: Path) -> None:
    """Nothing in them names a path of the machine any more: they work below any folder."""
    unpacked_headers(tmp_path / "root", "1-cloud")
    keep_headers(tmp_path / "root", "1-cloud", tmp_path / "headers")
    moved = (tmp_path / "headers").rename(tmp_path / "elsewhere")
    for name in ("build", "src/linux-headers-1-common"):
        assert (moved / name / "scripts").resolve() == moved / "lib/linux-kbuild-1/scripts"
    done = subprocess.run(["make", "-C", moved / "build"], capture_output=True, text=True, check=True)
    assert f"made in {(moved / 'build').resolve()}" in done.stdout
    assert not (moved / "src/linux-headers-1-common/arch/arm").exists()
    assert (moved / "src/linux-headers-1-common/arch/x86").exists()


def test_headers_of_another_kernel_are_refused(tmp_path: Path) -> None:
    """A module built against them would not load."""
    unpacked_headers(tmp_path / "root", "1-cloud")
    with pytest.raises(BuildError, match="no kernel headers for 2-cloud"):
        keep_headers(tmp_path / "root", "2-cloud", tmp_path / "headers")


def rows_of(page: str, heading: str) -> dict[str, str]:
    """Return a page's table whose header begins with `heading`: first cell -> whole row."""
    table = page[page.index(f"| {heading} |") :].split("\n\n", 1)[0].splitlines()[2:]
    return {re.split(r"(?<!\\) \| ", row)[0]: row for row in table}


def test_the_page_names_every_command_and_key_of_the_guest() -> None:
    """docs/guest.md has a row for each command, with each of its keys, and one for each key of a load."""
    folder = native_dir() / "guest" / "vfud-load"
    page = (native_dir().parent / "docs" / "guest.md").read_text()
    definition = (folder / "pattern.h").read_text().partition("#define PHASE_KEYS")[2].partition("\n\n")[0]
    phase = set(re.findall(r"(?<![|=a-z])([a-z_]+)[ #.=\"]", definition))
    assert {"pattern", "dirty_rate", "round_ns"} <= phase
    named = " ".join(rows_of(page, "Key").values())
    assert {key for key in phase if f"`{key}`" not in named} == set()

    source = (folder / "main.c").read_text()
    table = source[source.index("} commands[] = {") : source.index("};", source.index("} commands[] = {"))]
    commands = dict(re.findall(r'\{"([a-z-]+)", command_\w+, (?:"([^"]*)"|NULL)', table))
    assert len(commands) == table.count("command_")
    texts = [text for cell in rows_of(page, "Command") for text in re.findall(r"`([^`]+)`", cell)]
    assert {text.split()[0] for text in texts} == set(commands)
    for name, keys in commands.items():
        told = " ".join(text for text in texts if text.split()[0] == name)
        for key in re.findall(r"(?:^| )([a-z_]+)", keys):
            assert f"{key}=" in told, f"{name}: {key}"
