"""docs/libvirt.md and libvirt-variants.md, word for word, on two hosts: real daemons, real moves."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from libvirtkit import LibvirtHost, libvirt_hosts, newer_libvirt

# The second goes on where the first ends.
PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("libvirt.md", "libvirt-variants.md")]
HOSTS = {"source": 0, "destination": 1}
CONNECTIONS = {"TO_A": "qemu+tcp://a/system", "TO_B": "qemu+tcp://b/system"}
MEMORY = 8 << 20


def blocks(until: str | None = None) -> list[tuple[str, str]]:
    """Return (where, commands) of the page's `sh` blocks in order, up to the heading `until`."""
    page = "".join(path.read_text() for path in PAGES)
    if until is not None:
        page, heading, _ = page.partition(f"## {until}\n")
        assert heading
    found = re.findall(r"^```sh ?([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {where for where, _ in found} == {"both", *HOSTS}
    return found


def run_page(hosts: tuple[LibvirtHost, LibvirtHost], until: str | None = None) -> dict[str, str]:
    """Run it, and return what was said on each host."""
    said = dict.fromkeys(HOSTS, "")
    for where, commands in blocks(until):
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


def judge_moves(said: dict[str, str], moves: int) -> None:
    """Assert of the moves that the page looks at: all content went, most in PRE_COPY, and arrived."""
    saves, resumes = sessions(said["source"]), sessions(said["destination"])
    assert len(saves) == len(resumes) == moves
    for save, resume in zip(saves, resumes, strict=True):
        assert save["status"] == resume["status"] == "completed"
        assert save["audited"] is True
        assert save["digest"] == resume["digest"]
        assert save["initial_bytes"] > MEMORY
        assert save["precopy_bytes"] > save["stop_copy_bytes"] > 0
        assert resume["received_bytes"] == save["precopy_bytes"] + save["stop_copy_bytes"]
    assert len({save["digest"] for save in saves}) == moves


def judge_guest(said: dict[str, str], stops: tuple[int, int], checks: int) -> None:
    """Assert that the guest wrote each time, up to a `stop` there, and found all that it had written."""
    for host, count in zip(HOSTS, stops, strict=True):
        stopped = replies(said[host], "stop")
        assert len(stopped) == count
        assert all(one["writes"] > 0 for one in stopped)
    checked = [one for host in HOSTS for one in replies(said[host], "verify")]
    assert len(checked) == checks
    assert all(one["verified"] and one["compared_bytes"] == MEMORY for one in checked)


def judge_failures(said: dict[str, str], capabilities: set[str]) -> None:
    """Assert that one move was refused for the reason that the page shows, and one aborted."""
    refused, found, aborted = re.split(r"^set: (.*)$", said["source"], flags=re.MULTILINE)
    # Which of QEMU's last words libvirt hears depends on who is first; and QEMU may say of a migration that
    # was aborted that it failed (labkit.CANCELLED).
    failed = r"^error: (?:operation failed|internal error): "
    assert re.search(failed, refused, re.MULTILINE)
    assert re.search(rf"{failed}|^error: operation aborted: ", aborted, re.MULTILINE)
    assert "write_data refused: the stream comes from a device of another shape" in said["destination"]
    assert set(found.split()) == capabilities
    assert re.search(r"^downtime: \d+$", said["destination"], re.MULTILINE)


SETS = {"events", "return-path", "pause-before-switchover"}


@pytest.mark.timeout(900)
def test_the_page_word_for_word(
    qemu: Path, preload: Path, stock_qemu: Any, library: Path, guest_image: Path
) -> None:
    """Every block ends without an error; by our QEMU and by Debian's, as root and as an ordinary user."""
    stock_qemu("bookworm-backports")
    with libvirt_hosts(**CONNECTIONS) as hosts:
        said = run_page(hosts)
    judge_moves(said, 2)
    # To the other host, back, through a refusal and an abort; an ordinary user's VM; and Debian's QEMU.
    judge_guest(said, (2, 3), 6)
    judge_failures(said, SETS)
    assert re.search(r"^libvirt-qemu +qemu-system", said["source"], re.MULTILINE)


@pytest.mark.timeout(900)
def test_a_newer_libvirt_asks_for_the_switchover_ack(qemu: Path, library: Path, guest_image: Path) -> None:
    """The page's moves, back and forth, refused and aborted, by 11.3, which tells what VFIO sent."""
    with libvirt_hosts(newer_libvirt(), **CONNECTIONS) as hosts:
        version = hosts[0].shell("virsh --version")
        said = run_page(hosts, "Save and restore")
        # The page's moves undefine the domain at the source, whose figures these are.
        told = hosts[0].shell(
            'virsh migrate --live --p2p vm0 "$TO_B"\n'
            "virsh domjobinfo vm0 --completed --rawstats\n"
            "until status save | grep -q \"'audited': True\"; do sleep 0.1; done\n"
            "status save\n"
        )
    assert int(version.split(".")[0]) >= 11
    judge_moves(said, 1)
    judge_guest(said, (2, 1), 3)
    judge_failures(said, SETS | {"switchover-ack"})
    (save,) = sessions(told)
    (vfio,) = re.findall(r"^vfio_data_transferred: (\d+)$", told, re.MULTILINE)
    assert int(vfio) == save["precopy_bytes"] + save["stop_copy_bytes"]
