"""Record moves for `test_recorded_moves.py`: python tests/observe/record_moves.py [--moves N] FILE [SCENE]...

Real servers under a real QEMU (or `vfu_dev.client.migrator`) are moved, and what each source's forecaster was
fed is kept. Nobody asks a server anything while it moves: QEMU's own events say when that is over.
FILE ends in .jsonl.xz. Without a SCENE all of them are recorded; an existing FILE gets more moves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "lab")]

from linkkit import link  # noqa: E402
from movekit import Move, machine, read_moves, write_moves  # noqa: E402
from moves import Load, move  # noqa: E402
from ramkit import fill_ram, writing_ram  # noqa: E402
from recorded_device import FILE_VARIABLE  # noqa: E402
from serverkit import server_farm, short_folder  # noqa: E402

from vfu_dev.builds import artifact  # noqa: E402
from vfu_dev.lab.lab import Lab  # noqa: E402
from vfu_dev.lab.options import MigrateOptions  # noqa: E402
from vfu_dev.workload import Workload  # noqa: E402

MIB = 1 << 20
DEVICE = ("--device", f"{HERE / 'recorded_device.py'}:RecordedDevice")


def pages(rate: float) -> Workload:
    """Return a load that writes `rate` pages a second, anywhere."""
    return Workload("uniform", rate_pages=rate) if rate else Workload("idle")


def qemu(*, linux: bool = False, ram: float | None = None, rate: int = 0, **options: Any) -> dict[str, Any]:
    """Return a scene under QEMU.

    Args:
        linux: with a guest; else without a CPU.
        ram: without a guest: MiB a second that are written to RAM; None leaves it zero.
        rate: pages a second that are written to the device.
        options: of `MigrateOptions`; `link`: bytes a second of a link in between.
    """
    return {"client": "qemu", "linux": linux, "ram": ram, "rate": rate, "options": options}


def migrator(memory_mib: int, **load: Any) -> dict[str, Any]:
    """Return a scene of `vfu-dev migrate`; there and back, so that a server learns."""
    return {"client": "migrator", "memory_mib": memory_mib, "load": load}


FAST = {"max_bandwidth": 512 * MIB, "switchover_bandwidth": 80 * MIB}
SCENES: dict[str, dict[str, Any]] = {
    # Those of the shipped scenarios.
    "idle": qemu(linux=True, memory_bytes=8 * MIB, max_bandwidth=128 * MIB, switchover_bandwidth=4 * MIB),
    "steady": qemu(
        linux=True, rate=1000, memory_bytes=16 * MIB, max_bandwidth=64 * MIB, switchover_bandwidth=4 * MIB
    ),
    "one-large": qemu(
        linux=True, rate=500, memory_bytes=256 * MIB, max_bandwidth=128 * MIB, switchover_bandwidth=16 * MIB
    ),
    "precopy": qemu(
        rate=500,
        memory_bytes=1024 * MIB,
        max_bandwidth=512 * MIB,
        switchover_bandwidth=16 * MIB,
        load_place="device",
    ),
    "devices-four": qemu(
        linux=True,
        rate=200,
        memory_bytes=4 * MIB,
        devices=4,
        max_bandwidth=64 * MIB,
        switchover_bandwidth=4 * MIB,
    ),
    "many-small": qemu(
        linux=True, rate=60, memory_bytes=MIB, devices=8, max_bandwidth=64 * MIB, switchover_bandwidth=4 * MIB
    ),
    # Much left at the stop.
    "stop-20": qemu(rate=3072, memory_bytes=48 * MIB, **FAST),
    "stop-20-ram": qemu(rate=3072, ram=0, memory_bytes=48 * MIB, **FAST),
    "stop-20-written": qemu(rate=3072, ram=16, memory_bytes=48 * MIB, **FAST),
    "stop-20-limit": qemu(
        rate=3072, ram=8, memory_bytes=48 * MIB, max_bandwidth=48 * MIB, switchover_bandwidth=80 * MIB
    ),
    "stop-70": qemu(
        rate=4096,
        memory_bytes=192 * MIB,
        load_place="device",
        max_bandwidth=512 * MIB,
        switchover_bandwidth=256 * MIB,
    ),
    "stop-40-linux": qemu(
        linux=True, rate=4096, memory_bytes=128 * MIB, max_bandwidth=256 * MIB, switchover_bandwidth=160 * MIB
    ),
    "mapped": qemu(rate=3072, memory_bytes=48 * MIB, access="mmap", **FAST),
    "link": qemu(rate=3072, ram=0, memory_bytes=48 * MIB, link=100 * MIB, **FAST),
    "link-written": qemu(rate=3072, ram=16, memory_bytes=48 * MIB, link=100 * MIB, **FAST),
    "link-slow": qemu(rate=768, memory_bytes=32 * MIB, link=20 * MIB, max_bandwidth=512 * MIB),
    # Our own client, which keeps its bandwidth limit while the device stands still.
    "migrator": migrator(32, bytes_per_second=6 * MIB, bandwidth=16 * MIB, downtime_limit_seconds=0.6),
    "migrator-slowly": migrator(
        32, bytes_per_second=8 * MIB, bandwidth=16 * MIB, downtime_limit_seconds=0.06
    ),
    "migrator-slow": migrator(8, bytes_per_second=MIB, bandwidth=4 * MIB, downtime_limit_seconds=0.6),
    "migrator-fast": migrator(64, bytes_per_second=32 * MIB, bandwidth=None, downtime_limit_seconds=0.02),
    "migrator-idle": migrator(256, bytes_per_second=0, bandwidth=None, downtime_limit_seconds=0.02),
}


def own_pids() -> tuple[set[int], dict[int, int]]:
    """Return this process and everything below it, and the clock ticks that each process used."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            columns = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], ticks[pid] = int(columns[1]), int(columns[11]) + int(columns[12])
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return mine, ticks


@contextlib.contextmanager
def urgent(enabled: bool) -> Iterator[None]:
    """Give everything below this process the processors before all others, as on a machine of its own.

    For the time of a move alone, so that others are held up no longer than needed. Threads that are made
    meanwhile inherit it.
    """

    def schedule(policy: int, priority: int) -> None:
        for pid in own_pids()[0]:
            for thread in Path(f"/proc/{pid}/task").glob("*"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    if enabled:
        schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        if enabled:
            schedule(os.SCHED_OTHER, 0)


class Others:
    """How busy others keep the cores that we may use."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        self._busy, self._whole = self._machine()
        self._ours = self._own()

    def _machine(self) -> tuple[int, int]:
        """Return clock ticks of all our cores: busy, and altogether; proc_stat(5) has the columns."""
        busy = whole = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *columns = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._cores:
                ticks = [int(one) for one in columns[:8]]
                whole += sum(ticks)
                busy += sum(ticks) - ticks[3] - ticks[4]
        return busy, whole

    def _own(self) -> int:
        """Return the clock ticks of this process and everything below it."""
        mine, ticks = own_pids()
        return sum(ticks.get(pid, 0) for pid in mine)

    def share(self) -> float:
        """Return their share since this object was made."""
        busy, whole = self._machine()
        others = busy - self._busy - (self._own() - self._ours)
        return round(max(0.0, others / max(1, whole - self._whole)), 3)


def take(path: Path) -> list[list[Any]]:
    """Return the events of the migration that a server wrote down, and forget them."""
    (line,) = path.read_text().splitlines()
    path.unlink()
    events: list[list[Any]] = json.loads(line)
    return events


async def under_qemu(
    kind: str, scene: dict[str, Any], first_server: int, count: int, folder: Path, *, real_time: bool
) -> AsyncIterator[Move]:
    """Move one VM to and fro; each server is the source of one move, its first."""
    options = dict(scene["options"])
    rate_of_link = options.pop("link", None)
    chosen = MigrateOptions(
        qemu=artifact("qemu"), library=artifact("libvfio-user"), load=pages(scene["rate"]),
        guest_image=artifact("guest") if scene["linux"] else None, server_extra=DEVICE,
        warmup_seconds=0.3, settle_seconds=0.3, **options,
    )  # fmt: skip
    settings = {**options, "rate": scene["rate"], "ram": scene["ram"], "linux": scene["linux"]}
    settings |= {"link": rate_of_link}
    async with Lab(chosen, folder / "logs") as lab:
        await lab.start()
        if scene["ram"] is not None:
            await fill_ram(lab)
        for number in range(count):
            if number:
                await lab.turn_around()
            await lab.configure()
            async with contextlib.AsyncExitStack() as stack:
                target = Path((await lab.listen()).removeprefix("unix:"))
                uri = f"unix:{target}"
                if scene["ram"]:
                    await stack.enter_async_context(writing_ram(lab, scene["ram"] * MIB))
                if rate_of_link:
                    uri = stack.enter_context(link(target.with_name("link.sock"), target, rate_of_link))
                before = len(lab.source.qemu.events)
                others = Others()
                stack.enter_context(urgent(real_time))
                await lab.begin(uri)
                await completed(lab, before)
                share = others.share()
            await lab.wait_running(lab.destination.qemu)
            await lab.follow()
            measured = (await lab.source.qemu.migration())["downtime"]
            events = [take(folder / f"{server.name}.events") for server in lab.source.servers]
            yield Move(
                **machine(real_time), others=share, kind=kind, client="qemu", settings=settings,
                server=first_server + number, measured_ms=measured, devices=events,
            )  # fmt: skip


async def completed(lab: Lab, before: int, seconds: float = 120.0) -> None:
    """Wait for QEMU's word that the migration is over, the first after `before` events."""
    async with asyncio.timeout(seconds):
        while True:
            states = [one["data"].get("status") for one in lab.source.qemu.events[before:]]
            if "completed" in states:
                return
            if "failed" in states:
                raise RuntimeError("the migration failed")
            await asyncio.sleep(0.05)


def under_migrator(
    kind: str, scene: dict[str, Any], first_server: int, count: int, folder: Path, *, real_time: bool
) -> Iterator[Move]:
    """Move a device to and fro between two servers, each of which learns from its moves."""
    load = Load(timeout_seconds=60.0, **scene["load"])
    memory = f"{scene['memory_mib']}M"
    with short_folder() as short, server_farm(artifact("libvfio-user"), short) as serve:
        pair = [
            serve(*DEVICE, *fill, memory=memory, name=name)
            for name, fill in (("one", ("--fill", "1")), ("two", ()))
        ]
        for number in range(count):
            source, destination = pair if number % 2 == 0 else pair[::-1]
            others = Others()
            with urgent(real_time):
                progress = move(source, destination, load)
            share = others.share()
            path = folder / f"{('one', 'two')[number % 2]}.events"
            yield Move(
                **machine(real_time), others=share, kind=kind, client="migrator",
                server=first_server + number % 2, devices=[take(path)],
                settings={**scene["load"], "memory_mib": scene["memory_mib"]},
                measured_ms=progress.downtime_seconds * 1000,
            )  # fmt: skip


async def collect(moves: list[Move], recorded: AsyncIterator[Move]) -> None:
    """Append moves as they come."""
    async for one in recorded:
        moves.append(one)  # noqa: PERF401, one that fails leaves those before it


def main() -> None:
    """Record; what was recorded before a scene failed is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=", ".join(SCENES))
    parser.add_argument(
        "--real-time", action="store_true", help="have the processors before all others; needs root"
    )
    parser.add_argument("--moves", type=int, default=4, help="of each scene")
    arguments = parser.parse_args()
    moves = read_moves(arguments.file) if arguments.file.exists() else []
    for kind in arguments.scenes or SCENES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ[FILE_VARIABLE] = str(folder / "{}.events")
            scene, before = SCENES[kind], len(moves)
            first_server = 1 + max((one.server for one in moves if one.kind == kind), default=-1)
            rest = (kind, scene, first_server, arguments.moves, folder)

            try:
                if scene["client"] == "migrator":
                    moves += under_migrator(*rest, real_time=arguments.real_time)
                else:
                    asyncio.run(collect(moves, under_qemu(*rest, real_time=arguments.real_time)))
            finally:
                write_moves(arguments.file, moves)
            print(f"{kind}: {len(moves) - before} moves", flush=True)


if __name__ == "__main__":
    main()
