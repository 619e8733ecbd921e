"""The wheel that `make wheel` makes, and an environment that has nothing but it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installkit import Installed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, made as `make wheel` makes it."""
    for tool in ("hatchling", "auditwheel"):
        pytest.importorskip(tool)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, ROOT / "release" / "make_wheel.py", out]
    done = subprocess.run(command, env=_with_package(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


def _with_package() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Return the environment: the wheel alone is installed; what it depends on is this Python's own copy."""
    folder = tmp_path_factory.mktemp("vfu")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--quiet", wheel], check=True)
    cache = folder / "cache"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VFU_DEV_")}
    environment.pop("PYTHONPATH", None)
    environment |= {"PATH": str(folder / "bin"), "VFU_DEV_CACHE": str(cache), "HOME": str(folder)}
    for compiler in ("cc", "gcc", "clang", "make", "ninja", "dpkg-source", "apt-get"):
        assert shutil.which(compiler, path=environment["PATH"]) is None
    return Installed(folder, environment, cache)
