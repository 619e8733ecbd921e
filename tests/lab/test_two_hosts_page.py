"""docs/two-hosts.md, word for word, where another machine is a namespace with an sshd."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from pagekit import shell_blocks
from serverkit import PATIENCE_SECONDS
from sshkit import far_machine

PAGE = Path(__file__).parents[2] / "docs" / "two-hosts.md"


def test_the_page_word_for_word(qemu: Path, library: Path, guest_image: Path, tmp_path: Path) -> None:
    """Each of its three ways moved a device whose content both sides agree on."""
    blocks = shell_blocks(PAGE)
    assert len(blocks) >= 5
    script = tmp_path / "page.sh"
    script.write_text("set -e\n" + "\n".join(blocks))
    with far_machine() as machine:
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **machine.environment, "B": machine.url, "PATH": tools}
        environment["TMPDIR"] = "/tmp"  # UNIX sockets have short names
        with (tmp_path / "output").open("w") as out:
            done = subprocess.run(
                machine.near.enter(["bash", str(script)]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=tmp_path,
                timeout=2 * PATIENCE_SECONDS,
                check=False,
            )
    said = (tmp_path / "output").read_text()
    # 3: the machine was too busy for the load, and says so.
    assert done.returncode == 0, said[-3000:]
    pages = [Path(line) for line in re.findall(r"^report: (.*)$", said, re.MULTILINE)]
    assert [page.parent.name for page in pages] == ["link", "ssh", "watch"]
    reports = [json.loads((page.parent / "report.json").read_text()) for page in pages]
    for report in reports:
        assert report["problems"] == []
        (device,) = report["devices"]
        assert device["digest_match"]
        assert device["initial_bytes"] > 0
    link, ssh, watch = reports
    assert link["link"]["rate_by"] == "tbf"
    assert link["link"]["carried_bytes"] > link["devices"][0]["precopy_bytes"]
    assert ssh["guest"]["verified"]
    assert ssh["devices"][0]["precopy_bytes"] > 0
    assert ssh["clocks"]["error_seconds"] > 0
    assert watch["devices"][0]["initial_bytes"] > 4 << 20
    assert watch["qemu"]["front_end"] == "vfio-user-pci"
