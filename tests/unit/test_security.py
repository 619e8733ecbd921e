"""SECURITY.md: promises and limits have tests that are there, and limits are what the code says."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
TEXT = (TOP / "SECURITY.md").read_text()
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
LIMITS = re.findall(r"`(vfu_dev[\w.]+)\.([A-Z_]+)` = (\d+)", TEXT)


def test_the_tables_are_read() -> None:
    assert len(TESTS) > 25
    assert len(LIMITS) > 10


def test_every_promise_and_every_limit_names_its_test() -> None:
    """A row without one is a promise that nothing checks."""
    for heading, rows_at_least in (
        ("What is promised", 19),
        ("What a peer can make the server allocate", 13),
    ):
        section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("|")][2:]
        assert len(rows) >= rows_at_least
        for row in rows:
            last = row.strip("| ").rsplit("|", 1)[-1].strip()
            assert re.fullmatch(r"`tests/[\w/]+\.py::\w+`", last), row


@pytest.mark.parametrize(("file", "name"), sorted(set(TESTS)))
def test_each_promise_has_its_test(file: str, name: str) -> None:
    tree = ast.parse((TOP / file).read_text())
    assert name in {
        node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


@pytest.mark.parametrize(("module", "name", "value"), LIMITS)
def test_each_limit_is_what_the_code_says(module: str, name: str, value: str) -> None:
    assert getattr(importlib.import_module(module), name) == int(value)
