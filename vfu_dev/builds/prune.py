"""Removes from the cache what no recipe of this vfu-dev names any more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vfu_dev.builds.cache import Cache, disk_bytes
from vfu_dev.builds.recipe import Recipe


@dataclass(frozen=True)
class Outdated:
    """An artifact that no recipe names: its folder, bytes on disk, and what became of it."""

    path: Path
    size_bytes: int
    state: Literal["there", "removed", "locked"]


def prune(cache: Cache, recipes: Iterable[Recipe], *, remove: bool) -> Iterator[Outdated]:
    """Yield each artifact that has the key of none of `recipes`, removed if `remove`.

    What a build holds the lock of is left. The keys are computed before anything is removed.

    Raises: BuildError: a key cannot be computed. OSError: an artifact cannot be removed.
    """
    current = {recipe.folder(cache) for recipe in recipes}
    seen: set[tuple[int, int]] = set()
    for path in current:
        disk_bytes(path, seen)  # a file that a current artifact links is not freed
    for path in cache.artifacts():
        if path in current:
            continue
        size_bytes = disk_bytes(path, seen)
        if remove:
            yield Outdated(path, size_bytes, "removed" if cache.remove(path) else "locked")
        else:
            yield Outdated(path, size_bytes, "locked" if cache.is_locked(path) else "there")
