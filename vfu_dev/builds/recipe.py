"""Recipes of artifacts, and where the cache has what was made from them (`making` makes it)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from vfu_dev.builds.cache import Cache, input_key, path_meant
from vfu_dev.builds.prebuilt import prebuilt
from vfu_dev.errors import BuildError

if TYPE_CHECKING:
    from vfu_dev.builds.command import BuildContext

MANIFEST = "manifest.json"

# Facts about a build for its manifest: versions, flags, figures.
Facts = dict[str, object]


class NotBuiltError(BuildError):
    """The artifact `name` is not in the cache."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name} is not built here; run: vfu-dev build {name}")


class OverrideError(BuildError):
    """The file that the environment variable `variable` names cannot replace an artifact."""

    def __init__(self, variable: str, text: str, why: str) -> None:
        self.variable = variable
        super().__init__(f"{variable}={text}: {why}")


# Flags of cc for an artifact with sanitizers.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


@dataclass(frozen=True)
class Recipe:
    """How one artifact is made.

    `inputs` returns everything that determines its content, as JSON values; they become its key. `make`
    writes it into an empty folder and returns facts for the manifest. `product` is the path in that folder
    that `artifact()` returns, empty for the folder itself. `needs` are groups of `packages.GROUPS`. `after`
    are other artifacts that `make` reads; their keys count as inputs.
    """

    name: str
    summary: str
    product: str
    inputs: Callable[[], Mapping[str, object]]
    make: Callable[[BuildContext, Path], Facts]
    needs: tuple[str, ...] = ()
    after: tuple[Recipe, ...] = ()
    override: str = ""  # environment variable that names a file to use instead
    override_file: Callable[[Path], Path] = Path  # from what the variable names to that file

    @classmethod
    def with_flags(
        cls,
        name: str,
        summary: str,
        *flags: str,
        product: str,
        inputs: Callable[[tuple[str, ...]], Mapping[str, object]],
        make: Callable[[tuple[str, ...], BuildContext, Path], Facts],
        needs: tuple[str, ...],
        override: str = "",
    ) -> Self:
        """Return a recipe whose `inputs` and `make` get the compiler's `flags` as first argument."""
        return cls(
            name, summary, product, partial(inputs, flags), partial(make, flags), needs, override=override
        )

    def key(self) -> str:
        """Return the key that the artifact would have now. This compiles and fetches nothing."""
        depends = {recipe.name: recipe.key() for recipe in self.after}
        return input_key({"name": self.name, "inputs": self.inputs(), "after": depends})

    def folder(self, cache: Cache) -> Path:
        """Return the artifact's folder in `cache`, which may not exist."""
        return cache.artifact_dir(self.name, self.key())

    def overridden(self) -> Path | None:
        """Return the file that the environment names instead of the artifact.

        Raises: OverrideError: there is no such file.
        """
        text = os.environ.get(self.override) if self.override else None
        if not text:
            return None
        path = path_meant(text)
        if not path.exists():
            raise OverrideError(self.override, text, "no such file")
        try:
            return self.override_file(path)
        except BuildError as error:
            raise OverrideError(self.override, text, str(error)) from error

    def find(self, cache: Cache) -> Path:
        """Return the product's path. Raises: NotBuiltError: it is neither in the cache nor in this wheel."""
        if (path := self.overridden()) is not None:
            return path
        if (found := self.made(cache)) is not None:
            return found / self.product
        raise NotBuiltError(self.name)

    def manifest(self, cache: Cache) -> dict[str, object]:
        """Return the manifest of the artifact that `find` returns; empty if the file is none, or missing."""
        found = self.made(cache) if self.overridden() is None else None
        return read_manifest(found) if found is not None else {}

    def made(self, cache: Cache) -> Path | None:
        """Return its folder, None if there is none; one in the cache is preferred to the wheel's."""
        if not cache.is_empty and (folder := self.folder(cache)).is_dir():
            return folder
        return prebuilt(self.name)


def read_manifest(folder: Path) -> dict[str, object]:
    """Return the manifest of the artifact in `folder`; empty when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest: dict[str, object] = json.loads(path.read_text())
    return manifest
