"""Libraries of another age, as shared objects with their symbols: v1 is refused, v2 reduced."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vfu_dev import libvfio_user
from vfu_dev.errors import LibraryError
from vfu_dev.libvfio_user import _ffi
from vfu_dev.libvfio_user.library import DMA_ARGUMENTS_VARIABLE


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


def test_upstream_v2_is_driven_reduced_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DMA_ARGUMENTS_VARIABLE, raising=False)
    path = build(tmp_path, COMMON)
    library = libvfio_user.open_library(path)
    missing = " ".join(library.missing)
    assert library.api == "v2"
    assert not library.has_dma
    for word in ("MIG_GET_PRECOPY_INFO", "MIG_DATA_SIZE", "P2P", "DMA"):
        assert word in missing
    monkeypatch.setenv(DMA_ARGUMENTS_VARIABLE, "3")
    assert libvfio_user.open_library(path).has_dma
    monkeypatch.setenv(DMA_ARGUMENTS_VARIABLE, "4")
    with pytest.raises(LibraryError, match="only 3"):
        libvfio_user.open_library(path)


def test_another_version_of_our_extensions_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path, [*COMMON, *_ffi.EXT_PROTOTYPES])
    with pytest.raises(LibraryError, match="version 2 of the migration extensions, this program drives 1"):
        libvfio_user.open_library(path)
