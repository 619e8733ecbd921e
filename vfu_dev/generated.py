"""Parts of a Markdown page that a program writes, between two markers."""

from __future__ import annotations

END = "<!-- end -->\n"


def renewed(document: str, command: str, text: str) -> str:
    """Return `document` with `text` as the part that `command` writes.

    Raises:    ValueError: the document has no such part.
    """
    before, marker, rest = document.partition(f"<!-- begin: {command} -->\n")
    _, last, after = rest.partition(END)
    if not marker or not last:
        raise ValueError(f"the document lacks the markers of the part that {command} writes")
    return before + marker + text + last + after
