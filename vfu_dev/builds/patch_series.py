"""The patches of a series: their files, sums, and what they touch; `patches` applies them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.builds.cache import file_digest
from vfu_dev.errors import BuildError

_FILES = re.compile(rb"^diff --git a/(\S+) b/(\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """One file of a series, in git's format."""

    path: Path
    sha256: str
    touches: tuple[str, ...]  # files that it may change, add, rename or remove, relative to the tree


def read_series(folder: Path) -> list[Patch]:
    """Return the patches `*.patch` in `folder`, ordered by name; none if the folder is missing.

    Raises: BuildError: one is not in git's format, or names a file outside the tree.
    """
    series = []
    for path in sorted(folder.glob("*.patch")):
        names = {name.decode() for pair in _FILES.findall(path.read_bytes()) for name in pair}
        if not names:
            raise BuildError(f"{path} is not a patch in git's format: no `diff --git` line")
        if any(name.startswith("/") or ".." in name.split("/") for name in names):
            raise BuildError(f"{path} names files outside the tree")
        series.append(Patch(path, file_digest(path), tuple(sorted(names))))
    return series


def series_inputs(series: Sequence[Patch]) -> list[list[str]]:
    """Return the inputs that a series adds to an artifact's key: names and sums, in order."""
    return [[patch.path.name, patch.sha256] for patch in series]
