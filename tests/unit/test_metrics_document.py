"""docs/metrics.md lists the metrics that there are, and the fields that a log line has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vfu_dev.metrics.table import with_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
WATCHING = DOCUMENT.with_name("watching.md")


def test_the_table_is_the_present_one() -> None:
    """`python -m vfu_dev.metrics.table docs/metrics.md` makes it so."""
    text = DOCUMENT.read_text()
    assert with_table(text) == text


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        with_table("# Metrics\n")


def test_pictures_and_files_that_are_named_exist() -> None:
    root = DOCUMENT.parents[1]
    text = DOCUMENT.read_text() + WATCHING.read_text()
    pictures = re.findall(r"\]\((img/[^)]+)\)", text)
    assert len(pictures) == 5
    for picture in pictures:
        assert (DOCUMENT.parent / picture).is_file()
    for name in re.findall(r"`((?:tests|vfu_dev|deploy)/[\w./-]+)`", text):
        assert (root / name).exists(), name
