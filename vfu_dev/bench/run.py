"""Runs the cases, one after the other."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from vfu_dev import JSON_VERSION, __version__
from vfu_dev.bench import audit, dma, forecast, front_ends, mmio, start, stream, through_qemu, window
from vfu_dev.bench.figures import Effort, Failure, Figure
from vfu_dev.bench.machine import MOST_OTHER_WORK, OtherWork, awake, busy_core, machine, touch_memory
from vfu_dev.bench.peers import ARTIFACTS, Bench, bench
from vfu_dev.builds import artifact
from vfu_dev.builds.qemu_binary import find_qemu
from vfu_dev.errors import BuildError, VfuDevError

Case = Callable[[Bench, Effort], Iterator[Figure]]

CASES: dict[str, Case] = {
    "mmio": mmio.at_rest,
    "scraped": mmio.scraped,
    "polled": mmio.polled,
    "precopy": mmio.in_precopy,
    "stream-out": stream.out,
    "stream-in": stream.into,
    "window": window.data,
    "scan": stream.scans,
    "audit": audit.whole,
    "dma": dma.engine,
    "start": start.serve,
    "forecast": forecast.downtimes,
    "front-ends": front_ends.mmio_and_state,
    "qemu": through_qemu.state,
    "qemu-downtime": through_qemu.downtime,
}
NEED_QEMU = ("front-ends", "qemu", "qemu-downtime")

# Number of figures of each, for the time left.
FIGURES = {
    "mmio": 6,
    "scraped": 2,
    "polled": 2,
    "precopy": 6,
    "stream-out": 2,
    "stream-in": 1,
    "window": 3,
    "scan": 2,
    "audit": 1,
    "dma": 4,
    "start": 1,
    "forecast": 2,
    "front-ends": 4,
    "qemu": 2,
    "qemu-downtime": 1,
}

# What the processes of a case allocate, in multiples of the measured memory: devices, copies of sent data,
# files, and QEMU with 16 times as much.
TOUCHED = 8
TOUCHED_THROUGH_QEMU = 96


def possible() -> tuple[list[str], str]:
    """Return the cases that can be measured here, and why some cannot: our QEMU takes minutes to build."""
    try:
        find_qemu("patched")
    except BuildError as error:
        left_out = ", ".join(NEED_QEMU)
        return [name for name in CASES if name not in NEED_QEMU], f"{left_out} are left out: {error}"
    return list(CASES), ""


def run(
    names: Sequence[str],
    effort: Effort,
    reporter: Callable[[Figure | Failure], None] = lambda _: None,
    *,
    with_busy_core: bool = False,
) -> dict[str, object]:
    """Measure the cases `names`; return the JSON object.

    Figures are judged (`judged`) only if the machine did almost no other work. Otherwise the ratios depend on
    that work. A case that fails ends alone: the figures that it had, and all other cases, are in the object.

    Args:
        reporter: called with each figure as it comes, and with each failure.
        with_busy_core: keep one processor busy; such figures are not judged either.

    Raises: BuildError: what every case starts cannot be built.
    """
    for name in ARTIFACTS:
        artifact(name, build=True)
    before, started, began, others = machine(), time.time(), time.monotonic(), OtherWork()
    figures: list[Figure] = []
    failures: list[Failure] = []
    touched = 0
    with busy_core(with_busy_core), awake():
        for name in names:
            times = TOUCHED_THROUGH_QEMU if name.startswith("qemu") else TOUCHED
            touched = max(touched, touch_memory(times * effort.memory_mib << 20))
            measured = len(figures)
            try:
                with bench() as one:
                    for figure in CASES[name](one, effort):
                        figures.append(figure)
                        reporter(figure)
            except (VfuDevError, OSError, subprocess.SubprocessError) as error:
                missing = FIGURES[name] - (len(figures) - measured)
                failures.append(Failure(name, str(error) or type(error).__name__, missing))
                reporter(failures[-1])
    other_work = others.share()
    return {
        "version": JSON_VERSION,
        "kind": "bench",
        "vfu_dev": __version__,
        "machine": before,
        "load_average_after": machine()["load_average"],
        "other_work": round(other_work, 3),
        "busy_core": with_busy_core,
        "touched_mib": touched >> 20,
        "started": started,
        "seconds": time.monotonic() - began,
        "rounds": effort.rounds,
        "figures": [figure.to_json() for figure in figures],
        "failures": [asdict(failure) for failure in failures],
        "judged": other_work <= MOST_OTHER_WORK and not with_busy_core,
        # A figure that is missing keeps no limit.
        "kept": not failures and all(figure.kept for figure in figures),
    }
