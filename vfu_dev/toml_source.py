"""A TOML file's text, for errors that name its lines: scenarios, profiles."""

from __future__ import annotations

import re
from typing import Any

from vfu_dev.errors import ConfigError

# A key stands at the beginning of its line; what follows, however long, is not looked at.
_LOOKED_AT = 500


def parse_toml(name: str, text: str) -> dict[str, Any]:
    """Return the tables of a file. Raises: ConfigError: it has none; `name` is what errors call it."""
    import tomllib  # here: a server without a file need not pay for its patterns

    try:
        return tomllib.loads(text)
    except ValueError as error:  # also of an integer of more digits than Python reads
        raise ConfigError(f"{name}: is not TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply") from None


class Source:
    """The text of a TOML file, and where its keys are.

    Args: name: what errors call the file.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._lines = text.splitlines()

    def line_of(self, key: str) -> int | None:
        """Return the number of the line that sets `key` (dotted), or its table's, or None.

        The second of several tables `[[name]]` is `name[2]`; `name` is any of them.
        """
        best: tuple[int, int] | None = None
        table, plain = "", ""
        counts: dict[str, int] = {}
        for number, line in enumerate(self._lines, 1):
            line = line[:_LOOKED_AT]
            if header := re.match(r"\s*(\[+)\s*([^\]]+?)\s*\]", line):
                table = plain = _bare(header[2])
                if len(header[1]) > 1:
                    counts[plain] = counts.get(plain, 0) + 1
                    table = f"{plain}[{counts[plain]}]"
                here = any((key + ".").startswith(name + ".") for name in (table, plain))
                if here and (best is None or best[0] < 1):
                    best = (0, number)
                continue
            assigned = re.match(r"\s*([\w.\"'>-]+(?:\s*\.\s*[\w\"'>-]+)*)\s*=", line)
            if assigned:
                for name in {table, plain}:
                    full = ".".join(part for part in (name, _bare(assigned[1])) if part)
                    if full == key:
                        return number
                    if key.startswith(full + ".") and (best is None or len(full) > best[0]):
                        best = (len(full), number)
        return best[1] if best else None

    def error(self, key: str, text: str, element: str | None = None) -> ConfigError:
        """Return an error about `key`, with file and line; of a list's `element` where that is found."""
        line = self.line_of(key)
        if line is not None and element is not None:
            here = enumerate(self._lines[line - 1 :], line)
            line = next((number for number, content in here if element in content), line)
        return ConfigError(f"{self.name}{f':{line}' if line else ''}: {key}: {text}")


def _bare(key: str) -> str:
    return re.sub(r"[\"'\s]", "", key)
