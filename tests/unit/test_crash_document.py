"""docs/crash-matrix.md is the table that tests/lab/test_crash_matrix.py compares with the real thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from crash_page import COMMAND, PAGE, render, with_tables
from crashtable import BLOWS, CELLS, GONE, MOMENTS, STEPS, TABLE, VICTIMS, in_ci


def test_the_page_is_the_table() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page), f"{COMMAND} docs/crash-matrix.md writes it anew"
    assert f"`make test` runs {sum(map(in_ci, CELLS))} of them" in page


def test_there_is_a_row_for_every_cell() -> None:
    """48 of them, and none says that its victim survives being killed."""
    assert len(CELLS) == len(VICTIMS) * len(MOMENTS) * len(BLOWS) == 48
    assert [(cell.victim, cell.moment, cell.blow) for cell in CELLS if cell.expected is None] == []
    assert len(TABLE) == len(CELLS)
    for cell in CELLS:
        outcome = cell.expected
        assert outcome is not None
        places = {
            "source server": outcome.source_device,
            "destination server": outcome.destination_device,
            "source QEMU": outcome.source_vm,
            "destination QEMU": outcome.destination_vm,
        }
        assert (places.pop(cell.victim) == GONE) == (cell.blow == "killed"), cell
        assert GONE not in places.values(), cell
        assert outcome.then, cell
        assert any(" or " in state for state in outcome.states) == bool(outcome.why), cell
        assert set(outcome.then) <= STEPS.keys(), cell


def test_a_cell_that_is_missing_or_other_is_noticed() -> None:
    key, outcome = next(iter(TABLE.items()))
    fewer = {other: found for other, found in TABLE.items() if other != key}
    assert "MISSING" in render(fewer)
    assert "MISSING" not in render(TABLE)
    assert render(TABLE | {key: replace(outcome, migration="other")}) != render(TABLE)


@pytest.mark.parametrize("blow", BLOWS)
def test_every_victim_and_moment_is_in_the_default_run(blow: str) -> None:
    """Of those killed each victim and each moment; of those stopped at least one."""
    chosen = [cell for cell in CELLS if cell.blow == blow and in_ci(cell)]
    if blow == "killed":
        assert {cell.victim for cell in chosen} == set(VICTIMS)
        assert {cell.moment for cell in chosen} == set(MOMENTS)
    assert chosen
