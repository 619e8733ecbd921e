"""Parts of a Markdown page that a program writes, between two markers; the first has the whole command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

END = "<!-- end -->\n"


def renewed(document: str, command: str, text: str) -> str:
    """Return `document` with `text` as the part that `command`, which gets the page's path, writes.

    Raises: ValueError: the document has no such part.
    """
    begin = re.search(rf"^<!-- begin: {re.escape(command)} \S+ -->\n", document, re.MULTILINE)
    end = document.find(END, begin.end()) if begin else -1
    if begin is None or end < 0:
        raise ValueError(f"the document lacks the markers of the part that {command} writes")
    return document[: begin.end()] + text + document[end:]


def renew(pages: Sequence[str], with_part: Callable[[str], str]) -> None:
    """Renew each page, of a program's arguments, by `with_part`. Without one the program ends: status 1."""
    if not pages:
        sys.exit("name the page to write; the comment above its generated part has the whole command")
    for path in map(Path, pages):
        path.write_text(with_part(path.read_text()))
