"""docs/qemu-versions.md is what the tests claim; whether they show it they check themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from versionkit import FEATURES, ROWS, Row, shows
from versions_page import COMMAND, MISSING, PAGE, Claims, collect, render, with_table


@pytest.fixture(scope="module")
def claims() -> Claims:
    """What all tests claim."""
    return collect()


def test_the_page_says_what_the_tests_claim(claims: Claims) -> None:
    page = PAGE.read_text()
    assert page == with_table(page, claims), f"{COMMAND} docs/qemu-versions.md writes it anew"


def test_every_cell_has_a_test_or_a_reason(claims: Claims) -> None:
    """And none has both."""
    for row in ROWS:
        for feature in FEATURES:
            assert bool(claims.get((row, feature))) != bool(row.absent(feature)), (row, feature)


def test_the_tests_that_claim_are_there(claims: Claims) -> None:
    for tests in claims.values():
        for test, _ in tests:
            path, _, name = test.partition("::")
            assert f"def {name}(" in (Path(__file__).parents[2] / path).read_text()


def test_a_claim_that_is_gone_is_noticed(claims: Claims) -> None:
    cell = next(iter(claims))
    fewer = {key: tests for key, tests in claims.items() if key != cell}
    assert MISSING in render(fewer)
    assert MISSING not in render(claims)
    later = claims | {cell: [(test, True) for test, _ in claims[cell]]}
    assert render(later) != render(claims) or all(soak for _, soak in claims[cell])


def test_a_cell_that_cannot_be_is_not_claimed() -> None:
    with pytest.raises(AssertionError, match="does not ask for PRECOPY_INFOv2"):
        shows(Row("10.0", "vfio-pci", "type1"), "REINIT")
    with pytest.raises(AssertionError):
        shows(Row("9.2", "vfio-pci", "type1"), "PRE_COPY")
