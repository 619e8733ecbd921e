"""The server that lies, tests/wire/hostile.py, for tests here; without a lie it is a small and honest one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inside import Served

HOSTILE = Path(__file__).parents[1] / "wire" / "hostile.py"


@contextmanager
def liar(folder: Path, lie: str | None) -> Iterator[Served]:
    """Run the hostile server."""
    socket = folder / "liar.sock"
    argv = [sys.executable, str(HOSTILE), str(socket), *(["--lie", lie] if lie else [])]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield Served([str(socket)], [process.pid])
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
