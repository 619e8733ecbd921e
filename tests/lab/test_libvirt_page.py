"""docs/libvirt.md, word for word, on two hosts with Debian's libvirt: real daemons, real moves."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from libvirtkit import LibvirtHost, libvirt_hosts

PAGE = Path(__file__).parents[2] / "docs" / "libvirt.md"
HOSTS = {"source": 0, "destination": 1}


def blocks() -> list[tuple[str, str]]:
    """Return (where, commands) of the page's `sh` blocks in order."""
    found = re.findall(r"^```sh ?([^\n]*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert {where for where, _ in found} == {"both", *HOSTS}
    return found


def run_page(hosts: tuple[LibvirtHost, LibvirtHost]) -> dict[str, str]:
    """Run it, and return what was said on each host."""
    said = dict.fromkeys(HOSTS, "")
    for where, commands in blocks():
        for name, index in HOSTS.items():
            if where in (name, "both"):
                said[name] += hosts[index].shell(commands)
    return said


def replies(said: str, command: str) -> list[dict[str, Any]]:
    """Return the guest's replies to `command`."""
    return [json.loads(line) for line in said.splitlines() if line.startswith(f'{{"reply":"{command}"')]


def sessions(said: str) -> list[dict[str, Any]]:
    """Return what servers said of a save or a resume."""
    return [ast.literal_eval(line) for line in said.splitlines() if line.startswith("{'status'")]


@pytest.mark.timeout(600)
def test_the_page_word_for_word(
    qemu: Path, preload: Path, stock_qemu: Any, library: Path, guest_image: Path
) -> None:
    """Every block ends without an error, each move moved something, and the guest found all of it."""
    stock_qemu("bookworm-backports")
    with libvirt_hosts(TO_A="qemu+tcp://a/system", TO_B="qemu+tcp://b/system") as hosts:
        said = run_page(hosts)
    source, destination = said["source"], said["destination"]
    # By our QEMU and by Debian's: digests of the moves that the page looks at, and the content in PRE_COPY.
    saves, resumes = sessions(source), sessions(destination)
    assert len(saves) == len(resumes) == 2
    for save, resume in zip(saves, resumes, strict=True):
        assert save["status"] == resume["status"] == "completed"
        assert save["audited"] is True
        assert save["digest"] == resume["digest"]
        assert save["initial_bytes"] > 8 << 20
        assert save["precopy_bytes"] > save["stop_copy_bytes"] > 0
        assert resume["received_bytes"] == save["precopy_bytes"] + save["stop_copy_bytes"]
    assert saves[0]["digest"] != saves[1]["digest"]
    # The guest wrote across each of them: to the other host, back, through a refusal and an abort, as an
    # ordinary user's VM, and with Debian's QEMU.
    for host, count in ((source, 2), (destination, 3)):
        stops = replies(host, "stop")
        assert len(stops) == count
        assert all(one["writes"] > 0 for one in stops)
    checks = replies(source, "verify") + replies(destination, "verify")
    assert len(checks) == 6
    assert all(one["verified"] and one["compared_bytes"] == 8 << 20 for one in checks)
    assert "libvirt-qemu" in source
    assert re.search(r"^error: operation failed: .*(?:failed|error)", source, re.MULTILINE)
    assert "error: operation aborted" in source
    assert "another shape" in destination
    assert re.search(r"^downtime: \d+$", destination, re.MULTILINE)
