"""What the end-to-end tests share: the built artifacts, and options small enough to run in seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from labkit import small

from vfu_dev.builds import BuildError, artifact
from vfu_dev.builds.qemu_binary import QemuBinary, find_qemu
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions

T = TypeVar("T")


def _artifact(name: str) -> Path:
    try:
        return artifact(name)
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def qemu() -> Path:
    """The patched QEMU."""
    return _artifact("qemu")


@pytest.fixture(scope="session")
def unpatched() -> Path:
    """QEMU of the same version without the project's patches."""
    return _artifact("qemu-unpatched")


@pytest.fixture(scope="session")
def stock_qemu() -> Callable[[str], QemuBinary]:
    """Find Debian's QEMU of the suite that is the argument."""

    def find(suite: str) -> QemuBinary:
        _artifact(f"qemu-{suite}")
        return find_qemu(suite)

    return find


@pytest.fixture(scope="session")
def preload() -> Path:
    """The library that gives an unmodified QEMU the device."""
    return _artifact("vfio-preload")


@pytest.fixture(scope="session")
def library() -> Path:
    """Our libvfio-user."""
    return _artifact("libvfio-user")


@pytest.fixture(scope="session")
def guest_image() -> Path:
    """The folder with the guest's kernel and initramfs."""
    return _artifact("guest")


@pytest.fixture
def options(qemu: Path, library: Path) -> Callable[..., MigrateOptions]:
    """Make options for a small device; keyword arguments change single ones."""
    return lambda **changes: small(qemu, library, **changes)


@pytest.fixture
def in_lab(tmp_path: Path) -> Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, T]]], T]:
    """Run a scenario in a started lab and stop everything after it."""

    def run(chosen: MigrateOptions, scenario: Callable[[Lab], Coroutine[Any, Any, T]]) -> T:
        async def whole() -> T:
            async with Lab(chosen, tmp_path / "logs") as lab:
                await lab.start()
                return await scenario(lab)

        return asyncio.run(whole())

    return run
