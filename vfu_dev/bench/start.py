"""Start-up time of `vfu-dev serve`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

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

    ours()
    numpy()
    yield figure("serve/start", "ms", in_turns(effort.rounds, ours, numpy), "imports numpy")
