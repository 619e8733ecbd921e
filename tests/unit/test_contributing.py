"""CONTRIBUTING.md and tests/README.md name what there is: folders, kits, targets of make, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"]


def names(page: Path) -> set[str]:
    """Return what stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", page.read_text()))


def test_every_folder_and_every_kit_is_in_the_tables() -> None:
    named = names(ROOT / "tests" / "README.md")
    folders = {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}
    kits = {
        path.relative_to(ROOT / "tests").with_suffix("").as_posix()
        for path in (ROOT / "tests").rglob("*kit.py")
    }
    assert len(folders) > 5
    assert len(kits) > 10
    assert folders | kits <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_is_there(page: Path) -> None:
    """What looks like a file or folder of ours is one, seen from the page or from the top."""
    paths = {
        name for name in names(page) if re.fullmatch(r"(?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml)", name)
    }
    assert len(paths) > 3
    places = (ROOT, page.parent)
    missing = {
        path
        for path in paths
        if not any((place / name).exists() for place in places for name in (path, f"{path}.py"))
    }
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_target_of_make_is_one(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = set(re.findall(r"(?<![\w-])make ([a-z][\w-]*)(?=[\s`]|$)", page.read_text()))
    assert asked & {"test", "lint"}
    assert asked <= targets


def test_every_variable_is_read_somewhere() -> None:
    """VFU_DEV_... that a page names is in the code or in a test."""
    named = {name for page in PAGES for name in re.findall(r"VFU_DEV_[A-Z_]+", page.read_text())}
    code = "\n".join(
        path.read_text() for folder in ("tests", "vfu_dev") for path in (ROOT / folder).rglob("*.py")
    )
    assert named
    assert {name for name in named if f'"{name}"' not in code} == set()
