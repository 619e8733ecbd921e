"""From one front end to the other, in the QEMU that has both: tried, no promise (docs/qemu-versions.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from qtestkit import moving
from ramkit import qtest_of
from test_lab_dma import BUFFER_BYTES, BUFFERS, writer_migrates
from versionkit import ACKED, OURS, Evidence, Row, shows

from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.result import MigrationResult
from vfu_dev.qemu_events import TRACE_PATTERNS

USER = Row(OURS, "vfio-user-pci")
Options = Callable[..., MigrateOptions]


def case(path: str, *marks: pytest.MarkDecorator) -> object:
    """There and back, by that path."""
    kernel = Row(OURS, "vfio-pci", path)
    claims = [shows(row, "PRE_COPY", "P2P", "other front end") for row in (USER, kernel)]
    return pytest.param(path, marks=[*claims, *marks])


@pytest.mark.parametrize(
    "path",
    [case("iommufd-cdev"), case("iommufd-fd", pytest.mark.soak), case("type1", pytest.mark.soak)],
)
def test_a_vm_moves_between_the_front_ends(
    path: str, options: Options, preload: Path, evidence: Evidence, tmp_path: Path
) -> None:
    """Two devices with their writers, from vfio-user-pci to vfio-pci and back: all is whole."""
    qemu = options().qemu
    chosen = moving(
        lambda **changes: options(
            **changes,
            front_end="vfio-user-pci",
            qemu_destination=qemu,
            front_end_destination="vfio-pci",
            iommu_destination=path,
            traces=(*TRACE_PATTERNS, ACKED),
        ),
        2,
    )

    async def move(lab: Lab) -> list[int]:
        wrong = await writer_migrates(lab)
        result = MigrationResult()
        await lab.collect(result)
        evidence.of_move(lab, result)
        return wrong

    async def scenario() -> list[list[int]]:
        async with Lab(chosen, tmp_path / "logs") as lab:
            await lab.start()
            there = await move(lab)
            await lab.turn_around()
            # The writers begin anew, on memory without content.
            await qtest_of(lab).batch([f"memset {BUFFERS:#x} {4 * BUFFER_BYTES:#x} 0x0"])
            return [there, await move(lab)]

    assert asyncio.run(scenario()) == [[0, 0], [0, 0]]
