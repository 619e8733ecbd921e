"""A migration that cannot converge: `docs/reading-a-report.md`'s own command, and what it must show."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from labkit import CANCELLED
from schemakit import conforms
from serverkit import run_vfu_dev

PAGE = Path(__file__).parents[2] / "docs" / "reading-a-report.md"


def command_of_the_page(name: str) -> list[str]:
    """Return the command whose results the page puts into `out/name`."""
    (found,) = re.findall(rf"^vfu-dev (lab migrate .*--out out/{name})$", PAGE.read_text(), re.MULTILINE)
    return shlex.split(found)


def test_dirtying_above_the_link_ends_in_time_and_says_why(qemu: Path, library: Path, tmp_path: Path) -> None:
    """Exit status 1 at the end of --timeout; the figures live, at the end, in JSON and in the page."""
    argv = command_of_the_page("does-not-converge")
    limit = float(argv[argv.index("--timeout") + 1])
    done = run_vfu_dev(*argv, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.replace("\n", " ")
    # Seen while it ran, not only when it was over.
    live = lines[: lines.index("giving up")]
    assert re.search(r"not\s+converging: dirty rate .* > transfer rate .*\(ratio\s+0\.\d\d\)", live)
    problem, *others = re.findall(r"^PROBLEM: (.*)$", done.stderr, re.MULTILINE)
    assert re.fullmatch(
        rf"not finished within {limit:g} s: not converging: dirty rate \S+ MiB/s > transfer rate \S+ MiB/s "
        # Why it is more than --max-bandwidth, and what the threshold is made of.
        r"\(max-bandwidth 4 MiB/s, in QEMU's steps of 10 MiB/s\) \(ratio 0\.\d\d\), remaining \S+ MiB > "
        r"threshold 1\.2 MiB \(avail-switchover-bandwidth 4 MiB/s x 300 ms\)",
        problem,
    )

    out = tmp_path / "out" / "does-not-converge"
    result = json.loads((out / "report.json").read_text())
    conforms("lab-migrate", result)
    stood, device = result["convergence"], result["devices"][0]
    assert result["status"] == "failed"
    assert result["qemu"]["status"] in CANCELLED
    assert len(others) == (result["qemu"]["status"] == "failed"), others
    assert all(text.startswith("QEMU calls the migration that was cancelled 'failed': ") for text in others)
    assert stood["converging"] is False
    assert stood["ratio"] < 1
    assert stood["remaining_bytes"] > stood["threshold_bytes"]
    # Nothing is lost by trying: the source goes on.
    assert result["qemu"]["run_state_source"] == "running"
    assert device["state_source"] == "RUNNING"
    assert device["precopy_bytes"] > 2 * device["size_bytes"]
    assert device["pages_resent"] > 0
    assert len(device["save"]["pass_list"]) == device["passes"]
    page = (out / "report.html").read_text()
    assert problem.replace(">", "&gt;").replace("'", "&#39;") in page
    assert "has steps of 10 MiB/s" in page
    assert f"{result['qemu']['status']}, not converging" in page
    assert len(page) < 500 << 10


def test_page_shows_one_command_of_each_kind() -> None:
    """One command that converges, one that does not, and how to make the page again."""
    assert command_of_the_page("converges")
    assert "--timeout" in command_of_the_page("does-not-converge")
    text = PAGE.read_text()
    assert "vfu-dev report out/converges/report.json" in text
    for picture in re.findall(r"\]\((img/[\w.-]+)\)", text):
        assert (PAGE.parent / picture).exists()
