"""A real Linux guest: the whole command."""

from __future__ import annotations

import json
from pathlib import Path

from labkit import MIB
from schemakit import conforms
from serverkit import run_vfu_dev


def test_command_moves_a_linux_guest(qemu: Path, library: Path, guest_image: Path, tmp_path: Path) -> None:
    """`vfu-dev lab migrate` ends with status 0, and the guest found every byte it wrote."""
    argv = ["lab", "migrate", "--memory", "1M", "--dirty-rate", "1M", "--avail-switchover-bandwidth", "1M"]
    argv += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]
    done = run_vfu_dev(*argv)
    # 3: the machine was too busy for the load, which says nothing of the migration.
    assert done.returncode in (0, 3), done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((tmp_path / "out" / "report.json").read_text())
    conforms("lab-migrate", result)
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
