"""docs/device.md says of the reference device what its tables in the code say."""

from __future__ import annotations

import itertools
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

from vfu_dev.device.reference import layout
from vfu_dev.device.reference.dma import SLICE_BYTES
from vfu_dev.device.reference.layout import (
    DESCRIPTOR,
    FIELDS,
    STAMP_SEED,
    LoadPattern,
    LoadStatus,
    Op,
    Status,
    WriterStatus,
)

TEXT = (Path(__file__).parents[2] / "docs" / "device.md").read_text()


def tables() -> list[list[list[str]]]:
    """Return the document's tables: rows of cells, without backquotes, heads and rules left out."""
    found: list[list[list[str]]] = [[]]
    for line in TEXT.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


REGISTERS, DESCRIPTORS, OPERATIONS, STATUSES, WRITER, LOAD_PATTERNS, LOAD_STATUSES, _RESETS = tables()


def test_the_registers_are_those_of_the_device() -> None:
    assert [
        [
            f"0x{field.offset:03x}",
            str(np.dtype(field.format).itemsize),
            field.name,
            field.access,
            "yes" if field.migrates else "no",
            "kept" if field.survives_reset else "reset",
            field.doc,
        ]
        for field in FIELDS
    ] == REGISTERS


def test_registers_do_not_overlap() -> None:
    ends = sorted((field.offset, field.offset + np.dtype(field.format).itemsize) for field in FIELDS)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_the_descriptor_is_that_of_the_engine() -> None:
    assert DESCRIPTOR.fields is not None
    assert [row[:3] for row in DESCRIPTORS] == [
        [f"0x{field[1]:02x}", str(field[0].itemsize), name] for name, field in DESCRIPTOR.fields.items()
    ]


@pytest.mark.parametrize(
    ("table", "enum"),
    [
        (OPERATIONS, Op),
        (STATUSES, Status),
        (WRITER, WriterStatus),
        (LOAD_PATTERNS, LoadPattern),
        (LOAD_STATUSES, LoadStatus),
    ],
    ids=lambda x: "",
)
def test_numbers_are_those_of_the_code(table: list[list[str]], enum: type[IntEnum]) -> None:
    assert [row[:2] for row in table] == [[str(one.value), one.name] for one in enum]


def test_constants_in_the_text_are_those_of_the_code() -> None:
    for number in (layout.VENDOR_ID, layout.DEVICE_ID, STAMP_SEED):
        assert f"`{number:#x}`" in TEXT
    assert f"slices of {SLICE_BYTES >> 10} KiB" in TEXT
    assert f"MSI-X, {layout.MSIX_VECTORS} vectors" in TEXT
