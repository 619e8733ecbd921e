"""Programs that the library is preloaded into: their environment, and running them."""

from __future__ import annotations

import os
import subprocess

import pytest

from vfu_dev.builds import artifact
from vfu_dev.errors import BuildError

FIRST_FD = 100  # vfio.py
SECONDS = 300.0  # no test takes a tenth of it
VARIANTS = {"plain": "vfio-preload", "asan": "vfio-preload-asan", "tsan": "vfio-preload-tsan"}
SANITIZERS = {"plain": (), "asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",)}


def preload_of(variant: str) -> str:
    """Return LD_PRELOAD for a variant; a sanitizer's own library has to come first."""
    try:
        product = artifact(VARIANTS[variant], build=True)
    except BuildError as error:
        pytest.skip(str(error))
    first = [
        subprocess.run(
            ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in SANITIZERS[variant]
    ]
    return " ".join([*first, str(product)])


def preload_environment(variant: str, sockets: list[str]) -> dict[str, str]:
    """Return the environment of a process that the library is preloaded into."""
    environment = {
        "LD_PRELOAD": preload_of(variant),
        # On a busy machine a server may wait for its turn; tests of silence have a limit of their own.
        "VFU_DEV_PRELOAD_TIMEOUT_MS": str(round(SECONDS * 1000)),
        # CPython keeps what it allocates; and a sanitizer's word has to be the end.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    }
    return environment | {f"VFU_DEV_PRELOAD_SOCKET{number}": name for number, name in enumerate(sockets)}


def run_preloaded(
    argv: list[str],
    sockets: list[str],
    environment: dict[str, str] | None = None,
    *,
    variant: str = "asan",
    fds: bool = False,
    seconds: float = SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a program with the library preloaded; with `fds`, the way by descriptor is open too."""
    env = os.environ | preload_environment(variant, sockets) | (environment or {})
    if fds:
        numbers = [FIRST_FD + number for number in range(len(sockets) + 1)]
        env["VFU_DEV_PRELOAD_IOMMUFD"] = str(numbers[0])
        env |= {f"VFU_DEV_PRELOAD_FD{number}": str(fd) for number, fd in enumerate(numbers[1:])}
        opened = " ".join(f"{fd}<>/dev/null" for fd in numbers)
        argv = ["bash", "-c", f'exec {opened}; exec "$@"', "bash", *argv]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=seconds, check=False)
