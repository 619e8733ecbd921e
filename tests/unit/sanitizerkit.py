"""Runs a file of tests once more, with the kernels that have the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vfu_dev.builds import BuildError, artifact


def sanitized() -> dict[str, str] | None:
    """Return the environment of a process with ASan and UBSan in the kernels; None in such a process."""
    if os.environ.get("VFU_DEV_KERNELS"):
        return None
    try:
        library = artifact("vfu-kernels-asan", build=True)
    except BuildError as error:
        pytest.skip(str(error))
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return os.environ | {
        "VFU_DEV_KERNELS": str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0,abort_on_error=0",
        "PYTHONMALLOC": "malloc",
    }


def run_tests(file: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the tests in `file`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run_script(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a line of Python."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
