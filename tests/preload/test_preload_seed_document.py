"""Every line of trace in docs/seed.md is in the trace of a QEMU as Debian ships it, in the page's order."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from vfu_dev.builds import artifact
from vfu_dev.errors import BuildError
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult

sys.path.append(str(Path(__file__).parents[1] / "lab"))  # what keeps a migration in PRE_COPY is known there

from labkit import CANCELLED, MIB, begin_and_stay, dirtying, let_go, let_ram_go, wait_back_at_source

PAGE = Path(__file__).parents[2] / "docs" / "seed.md"
QEMUS = {"10.0": "qemu-bookworm-backports", "11.1": "qemu-trixie-backports"}
TRACES = (
    "vfio_save_*",
    "vfio_load_*",
    "vfio_state_pending*",
    "vfio_migration_*",
    "vfio_query_*",
    "vfio_vmstate_*",
)
NOTHING_LEFT = "vfio_save_block_precopy_empty_hit"
# What 10.0 puts before an event, and what `-msg timestamp=on` has 11.1 put there.
STAMP = r"^(?:\d+@[\d.]+:|\S+Z )"


def quoted(kind: str, release: str) -> list[str]:
    """Return the lines that the page's blocks of `kind` quote from that release, in order."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line[5:] for line in lines if line[:5].strip() in ("", release)]


def pattern_of(line: str) -> re.Pattern[str]:
    """Return what a quoted line stands for: N is any number, one above 1 any above 1."""
    text = re.escape(line).replace(r"\ ", r"\s+").replace(r"\(dev\)", r"\([^)]+\)")
    text = re.sub(r"\bN\b", r"\\d+", text)
    return re.compile(
        STAMP + re.sub(r"(?<![\w\\])([2-9]|[1-9]\d+)\b", r"(?:[2-9]|[1-9]\\d+)", text) + r"\s*$"
    )


def require_in_order(lines: list[str], trace: list[str]) -> None:
    """Demand that every quoted line is in the trace, each behind the one before."""
    at = 0
    for line in lines:
        wanted = pattern_of(line)
        found = next((i for i in range(at, len(trace)) if wanted.match(trace[i])), None)
        behind = "\n".join(trace[max(0, at - 3) : at + 40])
        assert found is not None, f"not in the trace, or not in this place: {line}\n{behind}"
        at = found + 1


@pytest.mark.parametrize("release", QEMUS)
def test_every_line_of_the_page_is_in_the_trace(release: str, library: Path, tmp_path: Path) -> None:
    """A cancelled migration and one that completes, after it found nothing to read in PRE_COPY."""
    try:
        qemu, guest = artifact(QEMUS[release]), artifact("guest")
    except BuildError as error:
        pytest.skip(str(error))
    options = MigrateOptions(
        qemu=qemu,
        front_end="vfio-pci",
        iommu="iommufd-cdev",
        library=library,
        guest_image=guest,
        memory_bytes=4 * MIB,
        load=dirtying(MIB // 4),
        max_bandwidth=64 * MIB,
        switchover_bandwidth=64 * MIB,
        # Keeps it in PRE_COPY at 1000 bytes a second: with fewer, QEMU 10 completes without having
        # asked for an exact size (migration.c divides them by 1000 as an integer).
        downtime_limit_ms=100,
        timeout_seconds=60.0,
        warmup_seconds=0.0,
        traces=TRACES,
    )

    def trace_of(side: str) -> list[str]:
        text = (tmp_path / f"{side}-trace.log").read_text(errors="replace")
        return [line for line in text.splitlines() if " vfio_" in line or ":vfio_" in line]

    async def scenario() -> tuple[list[str], list[str], list[str]]:
        async with Lab(options, tmp_path) as lab:
            await lab.start()
            await begin_and_stay(lab)
            await lab.wait_for(lambda row: row["status"] == "active", "active")
            await lab.source.qemu.execute("migrate_cancel")
            assert (await lab.wait_final())["status"] in CANCELLED
            await wait_back_at_source(lab)
            # An answer of QEMU's main thread: what that did to the device before is in the trace now.
            assert await lab.source.qemu.run_state() == "running"
            cancelled = trace_of("source")

            await lab.replace_destination()
            await begin_and_stay(lab)
            await let_ram_go(lab)
            await lab.wait_for(lambda row: NOTHING_LEFT in "".join(trace_of("source")), "an empty read")
            await let_go(lab)
            assert (await lab.wait_final())["status"] == "completed"
            await lab.wait_running(lab.destination.qemu)
            await lab.follow()
            result = MigrationResult()
            await lab.collect(result)
            assert result.devices[0].digest_match
            assert result.devices[0].precopy_bytes >= result.devices[0].initial_bytes > 4 * MIB
            await lab.source.qemu.stop()
            return cancelled, trace_of("source")[len(cancelled) :], trace_of("destination")

    cancelled, completed, destination = asyncio.run(scenario())
    require_in_order(quoted("trace-cancel", release), cancelled)
    require_in_order(quoted("trace", release), completed)
    require_in_order(quoted("trace-destination", release), destination)
    stopped = next(i for i, line in enumerate(completed) if "new state STOP_COPY" in line)
    assert any("vfio_save_iterate " in line for line in completed[:stopped])
    assert not any("vfio_save_iterate " in line for line in completed[stopped:])


def test_the_page_quotes_each_hook_in_each_version() -> None:
    """A guard against a page whose form the test above no longer reads."""
    for release in QEMUS:
        text = "\n".join(quoted("trace", release))
        for event in ("save_setup", "state_pending", "save_iterate_start", "precopy_empty_hit",
                      "complete_precopy_start", "save_cleanup"):  # fmt: skip
            assert event in text, (release, event)
        assert "save_cleanup" in "\n".join(quoted("trace-cancel", release))


def test_a_quoted_line_that_is_not_there_is_noticed() -> None:
    """Zero and one stand for themselves, and order counts."""
    trace = ["7@1.5:vfio_save_cleanup  (a) ", "7@1.6:vfio_save_complete_precopy  (a) ret 1"]
    require_in_order(["vfio_save_cleanup (dev)", "vfio_save_complete_precopy (dev) ret 1"], trace)
    for wrong in (["vfio_save_complete_precopy (dev) ret 0"], ["vfio_save_complete_precopy (dev) ret 1",
                                                              "vfio_save_cleanup (dev)"]):  # fmt: skip
        with pytest.raises(AssertionError, match="not in the trace"):
            require_in_order(wrong, trace)
