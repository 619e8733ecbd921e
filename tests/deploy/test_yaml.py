"""YAML under deploy/: yamllint, and no key that is given twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from promkit import DEPLOY
from yamllint import linter
from yamllint.config import YamlLintConfig

FILES = sorted([*DEPLOY.rglob("*.yml"), *DEPLOY.rglob("*.yaml")])
CONFIG = YamlLintConfig(
    """
extends: default
rules:
  line-length: {max: 110, allow-non-breakable-words: true}
  document-start: disable
  indentation: {indent-sequences: whatever}
"""
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(DEPLOY)))
def test_yamllint_has_nothing_to_say(file: Path) -> None:
    assert [str(problem) for problem in linter.run(file.read_text(), CONFIG)] == []
