"""One running VM moved back and forth: roles swap, old hosts go, the load runs on."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from labkit import KIB

from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]


def test_a_running_vm_moves_there_and_back(options: Options, in_lab: InLab, tmp_path: Path) -> None:
    """Four moves of one VM under load: each is whole, and in the end the guest finds every byte it wrote."""

    async def scenario(lab: Lab) -> list[MigrationResult]:
        results = []
        for number in range(4):
            results.append(await lab.move())
            assert lab.moves == number + 1
            assert results[-1].samples[0]["time"] >= results[-1].started
            await lab.turn_around()
            assert lab.samples == []
            assert await lab.source.qemu.run_state() == "running"
            # Two hosts, with two servers' and two QEMUs' files: nothing piles up.
            assert len(list(lab.sockets.glob("*.ctl"))) == 4
            assert len({path.name.split("-")[0] for path in lab.logs.glob("*-trace.log")}) <= 2
        await lab.guest.stop()
        results[-1].guest = await lab.guest.verify()
        return results

    results = in_lab(options(devices=2, memory_bytes=256 * KIB, downtime_limit_ms=200), scenario)
    for result in results[:-1]:
        judge(result, pre_copy=True, verified=False)
        assert result.problems == []
    judge(results[-1], pre_copy=True)
    assert results[-1].problems == []
    assert results[-1].guest is not None
    assert results[-1].guest.generation == 4
    # The load ran on: no two moves carried the same state.
    assert len({result.devices[0].digest_source for result in results}) == 4
    # A source that was a destination before shows this move's trace and samples alone.
    for result in results:
        states = result.qemu.states_source
        assert "RESUMING" not in states
        assert states.count("PRE_COPY") == 2  # one a device
        rows = result.devices[0].samples_source["rows"]
        assert not any("RESUMING" in row for row in rows)
