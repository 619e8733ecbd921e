"""How content is compared after a move: by DMA and a sample by MMIO, by MMIO alone, or by digests."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, dirtying

from vfu_dev.device.reference.layout import Status
from vfu_dev.lab.migrate import Lab, MigrateOptions, run
from vfu_dev.lab.options import Verify
from vfu_dev.vm import qtest_readback
from vfu_dev.vm.guest import GuestError, Via
from vfu_dev.vm.qtest_guest import QtestGuest
from vfu_dev.vm.qtest_readback import SAMPLE_WORDS
from vfu_dev.workload import Workload

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# A memory of 64 KiB and one page: the last block by MMIO, and the last copy by DMA, are shorter than others.
ODD_BYTES = 68 * KIB


async def written(lab: Lab) -> QtestGuest:
    """Return the guest of `lab` after it wrote to 16 places."""
    assert isinstance(lab.guest, QtestGuest)
    await lab.guest.write_pages(16, Workload("sequential", rate_pages=1, seed=3))
    return lab.guest


@pytest.mark.parametrize("via", ["auto", "dma", "mmio"])
def test_each_way_finds_every_wrong_byte(options: Options, in_lab: InLab, via: Via) -> None:
    """All is compared; then bytes are changed behind the journal's back, and are found and counted."""

    async def scenario(lab: Lab) -> None:
        guest = await written(lab)
        seen: list[tuple[int, int]] = []
        good = await guest.verify(via, lambda done, total: seen.append((done, total)))
        assert good.verified
        assert good.verify_via == ("mmio" if via == "mmio" else "dma")
        assert good.compared_bytes == ODD_BYTES
        assert seen[-1] == (ODD_BYTES, ODD_BYTES)
        # By DMA, the places written last are read by MMIO beside the random ones.
        assert good.sampled_words >= (0 if via == "mmio" else SAMPLE_WORDS)
        (device,) = guest.devices
        client, (offset, count) = guest.client, device.recent[-1]
        assert client is not None
        there = await client.read_block(device.bar2 + offset, count)
        await client.write_block(device.bar2 + offset, bytes([there[0] ^ 0xFF]) + there[1:])
        await client.write_block(device.bar2 + ODD_BYTES - 1, b"\x00")
        last = device.journal.read(ODD_BYTES - 8, 8)[-1]
        guest._result.compared_bytes = 0
        bad = await guest.verify(via)
        assert not bad.verified
        assert bad.mismatched_bytes == 1 + (last != 0)
        assert bad.first_mismatch is not None
        assert bad.first_mismatch["offset"] in (offset, ODD_BYTES - 8)
        assert bad.sampled_wrong_words >= (via != "mmio")
        assert f"{bad.mismatched_bytes} bytes differ" in bad.problem()

    in_lab(options(memory_bytes=ODD_BYTES, load=dirtying(0)), scenario)


def test_a_device_that_does_not_copy_says_so(
    options: Options, in_lab: InLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the engine's word and what does without it."""
    # Behind the end of guest memory.
    monkeypatch.setattr(qtest_readback, "BUFFER_ADDRESS", 1 << 38)

    async def scenario(lab: Lab) -> None:
        guest = await written(lab)
        with pytest.raises(
            GuestError, match=f"status {Status.UNMAPPED:d} .*; --verify mmio does not need it"
        ):
            await guest.verify("dma")

    in_lab(options(memory_bytes=ODD_BYTES, load=dirtying(0)), scenario)


def test_a_second_load_takes_the_first_ones_place(options: Options, in_lab: InLab) -> None:
    """Of two writers one would go on behind `stop`, and what it writes would be taken for a lost write."""

    async def scenario(lab: Lab) -> None:
        server = lab.source.servers[0]

        async def writes() -> int:
            return int((await server.status())["counters"]["region_writes"])

        for seed in (1, 2):
            before = await writes()
            await lab.guest.start(Workload(rate_pages=500, seed=seed))
            while await writes() < before + 64:
                await asyncio.sleep(0.01)
        others = [task for task in asyncio.all_tasks() if "QtestGuest._run" in repr(task.get_coro())]
        assert len(others) == 1
        await lab.guest.stop()
        stopped = await writes()
        found = await lab.guest.verify()
        assert found.verified
        assert found.mismatched_bytes == 0
        assert stopped >= 128

    in_lab(options(), scenario)


def test_writes_into_a_stop_that_ends_at_once_are_not_taken_for_done(
    options: Options, in_lab: InLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM is stopped before a batch begins, and runs before it is asked for: nothing has arrived."""

    async def scenario(lab: Lab) -> None:
        guest, qemu = await written(lab), lab.source.qemu
        assert guest.client is not None
        batch = guest.client.batch

        async def stopped(commands: list[str]) -> list[str]:
            replies = await batch(commands)
            await qemu.execute("cont")
            return replies

        await qemu.execute("stop")
        before = (await lab.source.servers[0].status())["counters"]["refused_by_state"]
        monkeypatch.setattr(guest.client, "batch", stopped)
        await guest.write_pages(8, Workload("sequential", rate_pages=1, seed=4))
        monkeypatch.undo()
        assert (await lab.source.servers[0].status())["counters"]["refused_by_state"] > before
        found = await guest.verify()
        assert found.verified
        assert (found.mismatched_bytes, found.readback_errors) == (0, 0)

    in_lab(options(), scenario)


@pytest.mark.parametrize("verify", ["digests", "none"])
def test_nothing_is_read_back_where_nobody_asks(options: Options, tmp_path: Path, verify: Verify) -> None:
    """`verified` is null, the load's figures are there, and all is as it should be."""
    result = asyncio.run(run(options(memory_bytes=64 * KIB, verify=verify), tmp_path, ["vfu-dev"]))
    assert result.problems == []
    found = result.to_json()
    assert found["status"] == "completed"
    assert found["devices"][0]["digest_match"]
    assert found["guest"]["verified"] is None
    assert found["guest"]["compared_bytes"] == 0
    assert found["guest"]["writes"] > 0


def test_ctrl_c_while_reading_back_keeps_the_migration(qemu: Path, library: Path, short_tmp: Path) -> None:
    """The signal's status, and the whole result of the migration, which had completed."""
    out = short_tmp / "out"
    # By MMIO 64 MiB take minutes on any machine: the signal comes in the middle.
    argv = [sys.executable, "-m", "vfu_dev", "lab", "migrate", "--guest", "none", "--memory", "64M"]
    argv += ["--verify", "mmio", "--out", str(out), "--json", str(short_tmp / "result.json")]
    lab = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert lab.stderr is not None
    said = ""
    for line in lab.stderr:
        said += line
        # Announced as soon as the first blocks tell the pace.
        if re.search(r"read back .* of 64 MiB .*about \d+ min left; Ctrl-C keeps", line):
            lab.send_signal(signal.SIGINT)
            break
    said += lab.communicate(timeout=120)[1]
    assert lab.returncode == 128 + signal.SIGINT, said
    assert "Traceback" not in said
    found = json.loads((short_tmp / "result.json").read_text())
    assert found["status"] == "completed", found["problems"]
    assert found["interrupted"]
    assert found["guest"]["verified"] is None
    assert found["devices"][0]["digest_match"]
    assert "it was interrupted" in (out / "report.html").read_text()
    assert "nothing was read back" in said
