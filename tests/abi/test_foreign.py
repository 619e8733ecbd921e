"""Libraries of another age, as shared objects with their symbols: v1 is refused, v2 reduced."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vfu_dev import libvfio_user
from vfu_dev.errors import LibraryError
from vfu_dev.libvfio_user import _ffi


def build(folder: Path, names: list[str]) -> Path:
    """Compile a shared object that exports `names`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc)")
    source, target = folder / "foreign.c", folder / "foreign.so"
    source.write_text("\n".join(f"int {name}(void) {{ return 2; }}" for name in names))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
    return target


COMMON = [*_ffi.PROTOTYPES, "vfu_setup_device_dma", "vfu_setup_device_migration_callbacks"]


def test_migration_v1_is_refused_in_words(tmp_path: Path) -> None:
    path = build(tmp_path, [*COMMON, "vfu_get_migr_register_area_size"])
    with pytest.raises(LibraryError, match=r"migration v1.*vfu-dev build libvfio-user"):
        libvfio_user.open_library(path)


def test_upstream_v2_is_driven_reduced_and_says_what_is_missing(tmp_path: Path) -> None:
    path = build(tmp_path, COMMON)
    library = libvfio_user.open_library(path)
    missing = " ".join(library.missing)
    assert library.api == "v2"
    for word in ("MIG_GET_PRECOPY_INFO", "MIG_DATA_SIZE", "P2P", "DMA"):
        assert word in missing


def test_a_library_without_dma_is_refused_in_words(tmp_path: Path) -> None:
    path = build(tmp_path, [name for name in COMMON if name != "vfu_setup_device_dma"])
    with pytest.raises(LibraryError, match="has no DMA"):
        libvfio_user.open_library(path)


def test_another_version_of_our_extensions_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path, [*COMMON, *_ffi.EXT_PROTOTYPES])
    with pytest.raises(LibraryError, match="version 2 of the migration extensions, this program drives 1"):
        libvfio_user.open_library(path)
