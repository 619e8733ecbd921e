"""Programs that write a part of a page: what they leave alone, and what they do without a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfu_dev.generated import renew, renewed

COMMAND = "python make.py"
PAGE = "before\n<!-- begin: python make.py PAGE -->\n{}<!-- end -->\nafter\n"


def test_only_the_part_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.write_text(PAGE.format("old\n"))
    renew([str(page)], lambda text: renewed(text, COMMAND, "new\n"))
    assert page.read_text() == PAGE.format("new\n")


@pytest.mark.parametrize("missing", ["<!-- begin", "<!-- end"])
def test_a_page_without_its_markers_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match=r"lacks the markers of the part that python make\.py writes"):
        renewed(PAGE.replace(missing, "<!-- "), COMMAND, "new\n")


def test_a_program_without_a_page_says_so() -> None:
    """Else it would write nothing, and look as if it had."""
    with pytest.raises(SystemExit, match="name the page"):
        renew([], str.upper)
