"""A real Linux guest: the whole command, and a reset that the guest's own kernel does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from labkit import KIB, MIB, dirtying

from vfu_dev.lab.guest import LinuxGuest
from vfu_dev.lab.judge import judge
from vfu_dev.lab.migrate import Lab, MigrateOptions
from vfu_dev.lab.result import MigrationResult

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

VFU_DEV = [sys.executable, "-m", "vfu_dev"]


def test_command_moves_a_linux_guest(qemu: Path, library: Path, guest_image: Path, tmp_path: Path) -> None:
    """`vfu-dev lab migrate` ends with status 0, and the guest found every byte it wrote."""
    argv = [
        *VFU_DEV,
        "lab",
        "migrate",
        "--memory",
        "1M",
        "--dirty-rate",
        "1M",
        "--switchover-bandwidth",
        "1M",
    ]
    argv += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((tmp_path / "out" / "report.json").read_text())
    assert result["status"] == "completed"
    assert result["devices"][0]["digest_match"]
    assert result["devices"][0]["precopy_bytes"] > MIB
    assert result["guest"]["kind"] == "linux"
    assert result["guest"]["verified"]
    assert result["guest"]["compared_bytes"] == MIB
    assert result["guest"]["mismatched_bytes"] == 0
    assert result["guest"]["readback_checks"] > 0
    assert result["guest"]["generation"] == 1
    assert result["qemu"]["vfio_bytes"] > MIB
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_guest_resets_the_device_in_precopy(options: Options, in_lab: InLab, guest_image: Path) -> None:
    """The guest's kernel resets the device while it is sent: registers go, memory and migration stay."""

    async def scenario(lab: Lab) -> MigrationResult:
        guest = lab.guest
        assert isinstance(guest, LinuxGuest)
        await lab.configure()
        await lab.begin(await lab.listen())
        await lab.wait_for(lambda row: row["source"][0].get("state") == "PRE_COPY", "PRE_COPY")
        before = (await lab.source.servers[0].status())["counters"]["resets"]
        reply = await guest.command("reset device=0")
        assert reply["scratch_cleared"]
        status = await lab.source.servers[0].status()
        assert status["counters"]["resets"] > before
        assert status["state"] == "PRE_COPY"
        await lab.source.qemu.execute("migrate-set-parameters", max_bandwidth=64 * MIB)
        assert (await lab.wait_final())["status"] == "completed"
        await lab.wait_running(lab.destination.qemu)
        await guest.follow(lab.destination.qemu)
        await guest.stop()
        result = MigrationResult(guest=await guest.verify())
        await lab.collect(result)
        judge(result, lab.options.pre_copy)
        return result

    result = in_lab(
        options(
            guest_image=guest_image,
            memory_bytes=256 * KIB,
            max_bandwidth=4 * MIB,
            load=dirtying(256 * KIB),
        ),
        scenario,
    )
    assert result.problems == []
