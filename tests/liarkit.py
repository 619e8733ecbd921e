"""The server that lies, `vfu-dev hostile`, and which of its lies a run tries."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Not of serverkit: tests/preload runs this outside of pytest.
HOSTILE = [sys.executable, "-m", "vfu_dev", "hostile"]


class Liar(NamedTuple):
    """One such server."""

    socket: Path
    pid: int


@contextmanager
def liar(folder: Path, lie: str | None) -> Iterator[Liar]:
    """Run one that tells this lie; without one it is small and honest."""
    socket = folder / "liar.sock"
    argv = [*HOSTILE, "--socket", str(socket), *(["--lie", lie] if lie else ["--honest"])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
            yield Liar(socket, process.pid)
        finally:
            process.terminate()


def all_lies(*phase: str) -> list[str]:
    """Return the names of all lies, or of those told in one phase."""
    argv = [*HOSTILE, "--list", "--names", *(["--phase", *phase] if phase else [])]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()


def lies_of(phase: str, share: int) -> list[str]:
    """Return lies told in `phase`: one in `share`, all with VFU_DEV_HOSTILE=all.

    They are chosen by their names, so that the choice is stable.
    """
    names = all_lies(phase)
    if os.environ.get("VFU_DEV_HOSTILE") == "all":
        return names
    return [name for name in names if zlib.crc32(name.encode()) % share == 0]
