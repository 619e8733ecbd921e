"""The downtime that is predicted against the one measured, and the verdict, while RAM shares the link."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from labkit import KIB, MIB, dirtying
from linkkit import link

from vfu_dev.lab.migrate import Lab, MigrateOptions
from vfu_dev.lab.qtest import QtestClient
from vfu_dev.lab.qtest_guest import QtestGuest
from vfu_dev.lab.result import MigrationResult

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# Of the qtest machine's 32 MiB: what no firmware uses.
RAM_FROM, RAM_BYTES = MIB, 28 * MIB
RAM_BLOCK = 256 * KIB
MOVES, MOST_MOVES = 3, 7
# A Gigabit Ethernet's worth: far below what two cores do, so that their other work decides nothing.
LINK_RATE = 100 * MIB


def qtest_of(lab: Lab) -> QtestClient:
    """Return the connection on which the guest's accesses go."""
    assert isinstance(lab.guest, QtestGuest)
    assert lab.guest.client is not None
    return lab.guest.client


async def fill_ram(lab: Lab) -> None:
    """Give the RAM a content, so that QEMU has to send it."""
    await qtest_of(lab).batch([f"memset {RAM_FROM:#x} {RAM_BYTES:#x} 0x5a"])


@contextlib.asynccontextmanager
async def writing_ram(lab: Lab, bytes_a_second: float) -> AsyncIterator[None]:
    """Have the guest write RAM, block after block, until the end of the context."""
    client, stopping = qtest_of(lab), False

    async def write() -> None:
        began, done = time.monotonic(), 0
        while not stopping:
            while done < (time.monotonic() - began) * bytes_a_second and not stopping:
                at = RAM_FROM + done % (RAM_BYTES - RAM_BLOCK)
                await client.batch([f"memset {at:#x} {RAM_BLOCK:#x} {done // RAM_BLOCK % 255 + 1:#x}"])
                done += RAM_BLOCK
            await asyncio.sleep(0.005)

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        stopping = True
        await task


class Downtime(NamedTuple):
    """Of one move, in seconds: predicted by the device's server, measured there, and by QEMU."""

    predicted: float
    measured: float
    qemu: float


def off(found: list[Downtime]) -> float:
    """Return by how much predictions are off what was measured, or that what QEMU measured: in the middle."""
    predicted = statistics.median(one.predicted / one.measured for one in found)
    measured = statistics.median(one.measured / one.qemu for one in found)
    return max(abs(predicted - 1), abs(measured - 1))


async def move(lab: Lab, ram_rate: float) -> MigrationResult:
    """Move the VM over the link while RAM is written; return what came of it."""
    result = MigrationResult()
    await lab.configure()
    target = Path((await lab.listen()).removeprefix("unix:"))
    async with writing_ram(lab, ram_rate):
        with link(target.with_name("link.sock"), target, LINK_RATE) as uri:
            await lab.begin(uri)
            reply = await lab.wait_final()
    assert reply["status"] == "completed"
    await lab.wait_running(lab.destination.qemu)
    await lab.guest.follow(lab.destination.qemu)
    await lab.collect(result)
    return result


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("ram_rate", "max_bandwidth"),
    [
        pytest.param(0, 512 * MIB, id="the link is the limit"),
        pytest.param(0, 48 * MIB, id="QEMU pauses to keep its limit"),
        pytest.param(16 * MIB, 512 * MIB, id="RAM is written"),
        pytest.param(8 * MIB, 48 * MIB, id="RAM is written, and QEMU pauses"),
    ],
)
def test_predicted_downtime_is_within_a_fifth(
    options: Options, in_lab: InLab, ram_rate: float, max_bandwidth: int
) -> None:
    """Steady load, steady link: predicted at the stop, measured by the device, measured by QEMU agree.

    The middle one of three moves of a running VM, some 20 MiB in STOP_COPY; a machine that is busy with other
    things gets up to seven.
    """
    chosen = options(
        memory_bytes=48 * MIB,
        load=dirtying(4 * MIB),
        max_bandwidth=max_bandwidth,
        switchover_bandwidth=80 * MIB,
        downtime_limit_ms=300,
    )

    async def moves(lab: Lab) -> list[Downtime]:
        found: list[Downtime] = []
        await fill_ram(lab)
        while len(found) < MOVES or (off(found) > 0.2 and len(found) < MOST_MOVES):
            if found:
                await lab.turn_around()
            result = await move(lab, ram_rate)
            (device,) = result.devices
            assert device.stop_copy_bytes > 10 * MIB
            assert device.predicted_downtime_seconds is not None
            assert device.downtime_seconds is not None
            assert result.qemu.downtime_ms is not None
            found.append(
                Downtime(
                    device.predicted_downtime_seconds,
                    device.downtime_seconds,
                    result.qemu.downtime_ms / 1000,
                )
            )
        return found

    found = in_lab(chosen, moves)
    assert off(found) <= 0.2, found


def test_ram_on_the_link_is_not_taken_for_a_slow_link(
    options: Options, in_lab: InLab, guest_image: Path
) -> None:
    """While QEMU sends RAM the device is read more slowly than written: too early to tell, never 'not'."""
    chosen = options(
        guest_image=guest_image,
        memory_bytes=8 * MIB,
        load=dirtying(8 * MIB),
        max_bandwidth=32 * MIB,
        switchover_bandwidth=0,
        downtime_limit_ms=300,
    )

    async def scenario(lab: Lab) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        lab.observe = lambda what, data: said.append(data) if what == "convergence" else None
        await lab.migrate()
        return said

    said = in_lab(chosen, scenario)
    texts = [one["text"] for one in said]
    busy = [one for one in said if one["ram_bytes"] > 16 * MIB and one["converging"] is not True]
    assert busy, texts
    # It was read too slowly to converge, or hardly at all.
    assert all(one["text"].startswith(("too early to tell", "measuring rates")) for one in busy), texts
    assert all(one["converging"] is not False for one in said), texts


def test_written_ram_does_not_hide_that_it_does_not_converge(options: Options, in_lab: InLab) -> None:
    """Once QEMU is through with its RAM and keeps finding as much of the device as before, it is said."""
    chosen = options(
        memory_bytes=4 * MIB,
        load=dirtying(64 * MIB, "sequential"),
        max_bandwidth=16 * MIB,
        switchover_bandwidth=0,
        downtime_limit_ms=50,
    )

    async def scenario(lab: Lab) -> str:
        await fill_ram(lab)
        async with writing_ram(lab, 2 * MIB):
            await lab.configure()
            await lab.begin(await lab.listen())
            await lab.wait_for(
                lambda _: lab.convergence is not None and lab.convergence.converging is False,
                "the verdict",
            )
            assert lab.convergence is not None
            text = lab.convergence.text
            await lab.give_up()
        return text

    assert "not converging: dirty rate" in in_lab(chosen, scenario)
