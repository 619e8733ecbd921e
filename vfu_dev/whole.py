"""Files that are written at once or not at all."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` to the file that `path` leads to; a reader sees all of it, or what was there before.

    What is there and is no regular file (`/dev/null`, a pipe) is written to. Replaced, it would be gone for
    everybody else on the machine.

    Raises: OSError: it cannot be written; a file that was there is as it was. `filename` is `path`, also
            where the disk is full, when the system names none.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None
        raise
