"""Nothing in the repository points at what is not in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (".ci", "deploy", "docs", "native", "tests", "vfu_dev")
# Patches are other people's text, data and pictures nobody's.
TEXTS = {".c", ".h", ".j2", ".html", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}

# A fact belongs where it is used, in words: not behind a number or a name that its author alone can look up.
ELSEWHERE = {
    "a numbered list that is not here": r"\b[Tt]rap \d",
    "a document that is not here": r"\bhouse[ -]style\b|\bthe brief\b",
    "a request that is not here": r"\bIssue: |\b[Ii]ssue \d+\b|\bas the issue (?:says|asks|wants)\b",
    "a machine of somebody's": r"(?<!\w)/work/|\.\./shared\b",
}
# Written by `vfu-dev lab run`, into the wheel, and for the site.
GENERATED = {
    "table.md",
    "SOURCES.md",
    "_prebuilt/SOURCES.md",
    "vfu_dev/_prebuilt/SOURCES.md",
    "reference.md",
    "../../commands.md",
}
# The folders that may lie beside a checkout: sources and packages for the day that the mirror drops them.
ALLOWED = {(".ci/run", "../shared")}


def texts() -> Iterator[tuple[str, str]]:
    """Yield name and text of every source and page."""
    paths = [path for path in ROOT.iterdir() if path.suffix in TEXTS and path.name != ".git"]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in TEXTS]
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and "__pycache__" not in path.parts and path != Path(__file__):
            yield name, path.read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_nothing_refers_to(kind: str) -> None:
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for name, text in texts()
        for match in re.finditer(ELSEWHERE[kind], text)
        if (name, match[0]) not in ALLOWED
    ]
    assert found == []


def test_every_page_that_is_named_is_here() -> None:
    """`docs/load.md`, `README.md`: by path, or by name beside the file that names it."""
    pages = {name for name, _ in texts() if name.endswith(".md")} | GENERATED
    missing = []
    for name, text in texts():
        if name == "CHANGELOG.md":  # says what pages were called
            continue
        for page in set(re.findall(r"(?<![\w/.*{}-])((?:\.\./)*(?:[\w-]+/)*[\w-]+\.md)\b", text)):
            beside = (ROOT / name).parent / page
            if page not in pages and not beside.is_file() and f"docs/{page}" not in pages:
                missing.append(f"{name}: {page}")
    assert missing == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a numbered list that is not here", "the socket is cut (trap 1)"),
        ("a document that is not here", "as the house style has it"),
        ("a request that is not here", 'Issue: "MMIO p99"'),
        ("a machine of somebody's", "see ../shared/notes"),
    ],
)
def test_a_reference_elsewhere_would_be_found(kind: str, text: str) -> None:
    assert re.search(ELSEWHERE[kind], text)
