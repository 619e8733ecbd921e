"""docs/any-vfio-program.md: its commands, run as they stand, and what the program said that it moved."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import textwrap
from pathlib import Path

from pagekit import ROOT, run_script
from preloadkit import preload_of
from serverkit import PATIENCE_SECONDS

PAGE = ROOT / "docs" / "any-vfio-program.md"
PROGRAM = ROOT / "docs" / "examples" / "vfio_move.py"
MEMORY_BYTES = 4 << 20
USED_BYTES = 64 << 10  # what the program writes during PRE_COPY

FIGURES = re.compile(
    r"PRE_COPY: initial_bytes (?P<first>\d+) dirty_bytes 0\n"
    r"initial data: (?P<initial>\d+) bytes\n"
    r"all read: initial_bytes 0 dirty_bytes 0\n"
    r"used: initial_bytes 0 dirty_bytes (?P<dirty>\d+)\n"
    r"dirty data: (?P<dirty_read>\d+) bytes\n"
    r"STOP_COPY: (?P<stop_copy>\d+) bytes\n"
    r"SHA-256 at the source: +(?P<sent>[0-9a-f]{64})\n"
    r"SHA-256 at the destination: +(?P<arrived>[0-9a-f]{64})\n"
)


def blocks(language: str) -> list[str]:
    """Return the page's blocks of a language in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_pages_commands_word_for_word(library: Path, tmp_path: Path) -> None:
    """Both migrations, there and back: all bytes promised are read, and the memory is the same.

    The page shows the first one's figures.
    """
    preload_of("plain")
    said = run_script("\n".join(blocks("sh")), tmp_path, ROOT, PATIENCE_SECONDS)
    for folder in re.findall(r"RUN=(/tmp/tmp\.\w+)", said):
        shutil.rmtree(folder, ignore_errors=True)
    moves = list(FIGURES.finditer(re.sub(r"^(\d{4}-|\+ ).*\n", "", said, flags=re.MULTILINE)))
    assert len(moves) == 2, said
    (shown,) = re.findall(
        r"(?:^    (?:PRE_COPY|\w+ \w+|used|STOP_COPY): .*\n)+", PAGE.read_text(), re.MULTILINE
    )
    assert moves[0][0].startswith(textwrap.dedent(shown))
    for move in moves:
        assert int(move["first"]) == int(move["initial"]) > MEMORY_BYTES
        assert int(move["dirty"]) == int(move["dirty_read"]) > USED_BYTES
        assert 0 < int(move["stop_copy"]) < USED_BYTES
        assert move["sent"] == move["arrived"]


def test_the_page_shows_the_program_as_it_is() -> None:
    (shown,) = blocks("python")
    assert shown.rstrip() in PROGRAM.read_text()
    for call in ("set_state(PRE_COPY)", "set_state(RESUMING)", "ENOMSG", "set_state(STOP_COPY)"):
        assert call in shown


def test_the_program_knows_nothing_of_this_project() -> None:
    """Only then would it run on hardware as it is."""
    found = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        assert not isinstance(node, ast.ImportFrom)
    assert found <= set(sys.stdlib_module_names)
