"""Files that are written at once or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
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


# Writes to the file that is named with room for 1000 bytes, as on a full disk.
SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from vfu_dev.whole import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(Path(sys.argv[1]), "x" * 5000)
except OSError as error:
    print(error.filename, error.strerror)
"""


def test_a_full_disk_leaves_what_was_there_and_names_the_file(tmp_path: Path) -> None:
    """The system's own error has no name in it, and "No space left on device" says little by itself."""
    path = tmp_path / "report.html"
    path.write_text("before")
    argv = [sys.executable, "-c", SMALL_DISK, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"{path} File too large\n"
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
