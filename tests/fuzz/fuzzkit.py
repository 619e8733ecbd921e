"""The fuzz targets, and runs of them: docs/fuzzing.md.

All targets take libFuzzer's command line. Those in C are the artifact `fuzz-targets`, those in Python run
under atheris (`target.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vfu_dev.builds import artifact

FOLDER = Path(__file__).parent
CORPUS = FOLDER / "corpus"
REPOSITORY = FOLDER.parents[1]
# Where modules are that targets and the first inputs import; pytest has these in its path.
KITS = tuple(str(folder) for folder in (REPOSITORY, FOLDER, FOLDER.parent, FOLDER.parent / "unit"))

C_TARGETS = ("server", "migration", "dma-log", "preload")
PYTHON_TARGETS = ("stream", "client")
TARGETS = (*C_TARGETS, *PYTHON_TARGETS)

# A planted fault has to be found by the corpus alone; see native/fuzz/planted and target.py.
PLANTED = "-planted"
MAX_INPUT_BYTES = 4096
_HANG_SECONDS = 60

_FIGURES = re.compile(rb"cov: (\d+) ft: (\d+) corp: (\d+)")
_EXECUTED = re.compile(rb"^(?:#(\d+)|stat::number_of_executed_units: (\d+))", re.MULTILINE)


def command_of(target: str, *, planted: bool = False) -> list[str]:
    """Return the command that runs `target`, without libFuzzer's options."""
    name = target + (PLANTED if planted else "")
    if target in PYTHON_TARGETS:
        return [sys.executable, str(FOLDER / "target.py"), name]
    return [str(artifact("fuzz-targets") / name)]


def environment() -> dict[str, str]:
    """Return the environment of a target: an allocation that fails is no finding, a leak is one."""
    return os.environ | {
        "ASAN_OPTIONS": "allocator_may_return_null=1",
        "PYTHONPATH": os.pathsep.join(one for one in (*KITS, *sys.path) if one),
    }


def corpus_of(target: str) -> Path:
    """Return the folder of the inputs that are kept for `target`."""
    return CORPUS / target


@dataclass
class Run:
    """What one process of a target said and found."""

    status: int = 0
    executions: int = 0
    edges: int = 0
    features: int = 0
    corpus: int = 0
    tail: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The last lines of its output."""
        return "".join(self.tail)

    def take(self, line: bytes) -> None:
        """Follow a line of libFuzzer's output."""
        self.tail.append(line.decode(errors="replace"))
        del self.tail[:-200]
        if found := _FIGURES.search(line):
            self.edges, self.features, self.corpus = (int(one) for one in found.groups())
        if count := _EXECUTED.match(line):
            self.executions = int(count[1] or count[2])


def run(
    target: str,
    *arguments: str | Path,
    planted: bool = False,
    follow: Callable[[Run], None] = lambda _: None,
    nice: int = 0,
) -> Run:
    """Run `target` to its end, with libFuzzer's `arguments`; `follow` gets each step of it."""
    found = Run()
    command = [*command_of(target, planted=planted), "-print_final_stats=1", f"-timeout={_HANG_SECONDS}"]
    # The peak that the kernel knows includes the parent's before exec; one allocation has a limit.
    command += ["-rss_limit_mb=0", "-malloc_limit_mb=2048"]
    with subprocess.Popen(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        preexec_fn=lambda: os.nice(nice) and None,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found.take(line)
                follow(found)
        except BaseException:
            process.terminate()
            raise
    found.status = process.returncode
    return found


def replay(target: str, inputs: Sequence[Path], *, planted: bool = False) -> Run:
    """Give `target` each of `inputs` once; the status is 0 if nothing is wrong."""
    return run(target, *inputs, planted=planted)
