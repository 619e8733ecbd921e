"""Files that are written at once or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from vfu_dev.whole import write_whole


def test_what_is_no_regular_file_is_written_to_and_stays(tmp_path: Path) -> None:
    """A pipe in place of /dev/null: its reader gets the text, and it is a pipe afterwards."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "figures\n")
    reader.join()
    assert got == ["figures\n"]
    assert pipe.is_fifo()


def test_a_link_goes_on_leading_to_its_file(tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("before")
    link.symlink_to(there)
    write_whole(link, "after")
    assert link.is_symlink()
    assert there.read_text() == "after"


def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full half-way."""
    path = tmp_path / "report.json"
    path.write_text("before")

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]
