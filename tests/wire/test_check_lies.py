"""Every check of `vfu-dev check` passes against an honest server, and fails against one that lies to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checklies import CASES, Case, lying_server
from serverkit import PATIENCE_SECONDS, short_folder

from vfu_dev.conformance import CHECKS, Result, Status, choose, run

IMPATIENT_SECONDS = 0.3


def results(path: Path, names: list[str], case: Case | None) -> list[Result]:
    seconds = IMPATIENT_SECONDS if case is not None and case.impatient else PATIENCE_SECONDS
    with lying_server(path, case):
        return list(run(path, choose(names, []), timeout_seconds=seconds))


def test_an_honest_server_passes_every_check() -> None:
    """None is skipped either: so each of them can be seen to fail below."""
    before = set(os.listdir("/proc/self/fd"))
    with short_folder() as folder:
        found = results(folder / "honest", [], None)
    assert len(found) == len(CHECKS) > 150
    assert [(one.check.name, one.detail) for one in found if one.status is not Status.PASS] == []
    assert set(os.listdir("/proc/self/fd")) <= before


def test_there_is_a_lie_for_every_check() -> None:
    assert {name.partition(" ")[0] for name in CASES} == CHECKS.keys()


@pytest.mark.parametrize("name", list(CASES))
def test_a_lie_fails_its_check(name: str) -> None:
    """And says what was found; a must that fails is what the exit status is about."""
    with short_folder() as folder:
        (found,) = results(folder / "liar", [name.partition(" ")[0]], CASES[name])
    assert found.status is Status.FAIL, (found.status, found.detail)
    assert found.detail
