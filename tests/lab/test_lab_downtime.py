"""What a downtime lies between, what is kept of a prediction, and the verdict while RAM shares the link.

How close predictions come is a matter of recorded moves (tests/observe/test_recorded_moves.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from labkit import MIB, begin_and_stay, dirtying, let_go
from linkkit import link
from ramkit import fill_ram, writing_ram

from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import DeviceResult, MigrationResult

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# A Gigabit Ethernet's worth.
LINK_RATE = 100 * MIB


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


def left(transitions: list[dict[str, Any]], *states: str) -> float:
    """Return when the last change from one of `states` to another state was; Unix time."""
    return max(one["time"] for one in transitions if one["from"] in states and one["to"] not in states)


def event(events: list[dict[str, Any]], name: str) -> float:
    """Return when QEMU last told of `name`; Unix time."""
    return max(one["time"] for one in events if one["event"] == name)


def order(device: DeviceResult, result: MigrationResult) -> list[float]:
    """Return the times of what a downtime is made of, in the order in which it has to happen."""
    return [
        left(device.transitions_source, "RUNNING", "PRE_COPY"),  # the device's begins
        event(result.qemu.events_source, "STOP"),  # QEMU's does
        left(device.transitions_destination, "RESUMING"),  # everything arrived, and is verified
        event(result.qemu.events_destination, "RESUME"),
        left(device.transitions_source, "STOP_COPY"),  # the device's ends
    ]


@pytest.mark.parametrize(
    ("ram_rate", "max_bandwidth"),
    [
        pytest.param(0, 512 * MIB, id="the link is the limit"),
        pytest.param(8 * MIB, 48 * MIB, id="RAM is written, and QEMU pauses"),
    ],
)
def test_device_and_qemu_measure_the_same_downtime(
    options: Options, in_lab: InLab, ram_rate: float, max_bandwidth: int
) -> None:
    """Both from the stop to the destination's word; the prediction of the stop is kept beside them.

    A second move by another server has figures of its own.
    """
    chosen = options(
        memory_bytes=48 * MIB,
        load=dirtying(4 * MIB),
        max_bandwidth=max_bandwidth,
        switchover_bandwidth=80 * MIB,
        downtime_limit_ms=300,
    )

    async def moves(lab: Lab) -> list[MigrationResult]:
        await fill_ram(lab)
        found = [await move(lab, ram_rate)]
        await lab.turn_around()
        return [*found, await move(lab, ram_rate)]

    found: list[MigrationResult] = in_lab(chosen, moves)
    for result in found:
        (device,) = result.devices
        times = order(device, result)
        assert times == sorted(times)
        predicted, measured = device.predicted_downtime_seconds, device.downtime_seconds
        assert predicted is not None
        assert math.isfinite(predicted)
        assert predicted > 0
        assert device.save is not None
        assert device.save["predicted_downtime_seconds"] == predicted
        assert measured is not None
        assert device.stop_copy_seconds is not None
        assert device.stop_copy_seconds <= measured
        assert result.qemu.downtime_ms is not None
    first, second = (result.devices[0].downtime_seconds for result in found)
    assert first != second


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
        lab.reporter = lambda what, data: said.append(data) if what == "convergence" else None
        # It goes on after a sample taken while RAM is sent, however late that sample comes.
        await begin_and_stay(lab)
        await lab.wait_for(lambda row: row["status"] == "active", "RAM is sent")
        await let_go(lab)
        reply = await lab.wait_final()
        assert reply["status"] == "completed", reply
        return said

    said = in_lab(chosen, scenario)
    texts = [one["text"] for one in said]
    busy = [one for one in said if one["ram_bytes"] > 16 * MIB and one["converging"] is not True]
    assert busy, texts
    # It was read too slowly to converge, or hardly at all.
    assert all(one["text"].startswith(("too early to tell", "measuring rates")) for one in busy), texts
    assert all(one["converging"] is not False for one in said), texts


def test_written_ram_does_not_hide_that_it_does_not_converge(options: Options, in_lab: InLab) -> None:
    """Once QEMU has sent its RAM and still finds as much of the device as before, the lab says so.

    The device itself writes: another process may not get a processor for as long as a pass takes.
    """
    chosen = options(
        memory_bytes=4 * MIB,
        load=dirtying(64 * MIB, "sequential"),
        load_place="device",
        max_bandwidth=16 * MIB,
        switchover_bandwidth=MIB,  # a threshold of 52 KiB, however much RAM QEMU sends in a moment
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
