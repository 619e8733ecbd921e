"""Start-up time of `vfu-dev serve`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vfu_dev.bench.figures import Effort, Figure, figure, in_turns
from vfu_dev.bench.peers import Bench


def serve(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Measure milliseconds from the command to a listening socket; the peer is Python importing numpy."""

    def ours() -> float:
        began = time.perf_counter()
        server = bench.ours(effort.memory_mib, fill=0)
        took = time.perf_counter() - began
        bench.stop(server)
        return took * 1000

    def numpy() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import numpy"], check=True)
        return (time.perf_counter() - began) * 1000

    with bytecode_kept():
        ours()
        numpy()
        times = in_turns(effort.rounds, ours, numpy)
    yield figure("serve/start", "ms", times, "imports numpy")


@contextmanager
def bytecode_kept() -> Iterator[None]:
    """Let child processes keep compiled modules, in a folder of their own, where the environment forbids it.

    numpy's modules were compiled by its installer. Those of a clone would be compiled at each start.
    """
    if not sys.dont_write_bytecode:
        yield
        return
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="vfu-dev-bytecode-") as folder:
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
