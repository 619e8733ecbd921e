"""Many threads at once, as QEMU's vCPUs, main loop and migration threads are, under the thread sanitizer."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from inside import Served
from preloadkit import run_preloaded

from vfu_dev.builds import Cache

SOURCE = Path(__file__).parent / "threads.c"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """threads.c, instrumented as the library is."""
    headers = next((Cache().root / "trees").glob("qemu-*/linux-headers"))
    program = tmp_path_factory.mktemp("threads") / "threads"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread", "-pthread"]
    subprocess.run(["cc", *flags, "-isystem", str(headers), "-o", str(program), str(SOURCE)], check=True)
    return program


@pytest.mark.parametrize("variant", ["tsan", "plain"])
def test_threads_do_not_race(variant: str, driver: Path, served: Served) -> None:
    """Regions, maps, the log, migration and descriptors, while the device does DMA by message."""
    names = ("writer_buffer", "writer_length", "writer_rate", "writer_ctrl")
    registers = [str(served.registers[name][0]) for name in names]
    done = run_preloaded([str(driver), "40", *registers], served.sockets, variant=variant)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = dict(re.findall(r"(\w+) (\d+)", done.stdout))
    assert int(figures["dirty"]) > 0, "the device wrote nothing: nothing was tried"
    assert int(figures["data"]) > 0
    assert done.stdout.split()[-1] == "done"
