"""Recipes, and how the cache's artifacts are made from them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import vfu_dev
from vfu_dev.builds import fetch, packages
from vfu_dev.builds.cache import Cache, file_digest, input_key
from vfu_dev.builds.command import BuildContext, compiler_version
from vfu_dev.builds.prebuilt import prebuilt
from vfu_dev.builds.progress import Reporter, default_reporter
from vfu_dev.errors import BuildError

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
        path = Path(text).expanduser().absolute()
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
        folder = self.folder(cache)
        return folder if folder.is_dir() else prebuilt(self.name)


@dataclass(frozen=True)
class BuildOptions:
    """How to build: parallel jobs (0 = processors available), and folders with the pinned sources."""

    jobs: int = 0
    sources: Path | None = None
    sources_fallback: Path | None = None

    @classmethod
    def from_environment(cls, jobs: int = 0, sources: Path | None = None) -> BuildOptions:
        """Set missing values from VFU_DEV_SOURCES and VFU_DEV_SOURCES_FALLBACK."""
        return cls(
            jobs=jobs,
            sources=sources or fetch.folder_from_environment(fetch.SOURCES_ENVIRONMENT),
            sources_fallback=fetch.folder_from_environment(fetch.FALLBACK_ENVIRONMENT),
        )


@dataclass(frozen=True)
class Built:
    """One artifact after `build`: its path, whether it was made now, and how long that took."""

    name: str
    path: Path
    built: bool
    seconds: float


def build(
    recipe: Recipe,
    cache: Cache,
    options: BuildOptions | None = None,
    reporter: Reporter | None = None,
    again: bool = False,
) -> Built:
    """Make sure that the artifact of `recipe` is in the cache; with `again`, build it in any case.

    One process builds an artifact; others that need it wait, and say so. An interrupted build leaves nothing
    that could be taken for an artifact.

    Raises: BuildError: with the command, its last lines and the log's path where a command failed.
    """
    started = time.monotonic()
    if (path := recipe.overridden()) is not None:
        return Built(recipe.name, path, False, 0.0)
    if not again and (found := recipe.made(cache)) is not None:
        return Built(recipe.name, found / recipe.product, False, time.monotonic() - started)
    options = options or BuildOptions.from_environment()
    reporter = reporter or default_reporter()
    for dependency in recipe.after:
        build(dependency, cache, options, reporter)
    context = BuildContext(
        cache,
        reporter,
        cache.log_path(recipe.name, "packages"),
        options.jobs or len(os.sched_getaffinity(0)),
        options.sources,
        options.sources_fallback,
    )
    packages.require(context, recipe.needs, f"building {recipe.name}")
    compiler_version.cache_clear()  # the compiler may be among what was just installed
    key = recipe.key()
    folder = cache.artifact_dir(recipe.name, key)
    with cache.lock(f"{recipe.name}-{key}", context.reporter_waiting(f"building {recipe.name}")) as fd:
        if folder.is_dir() and not again:
            return Built(recipe.name, folder / recipe.product, False, time.monotonic() - started)
        cache.sweep()
        context.log = cache.log_path(recipe.name, key)
        context.log.write_bytes(b"")
        context.fds.append(fd)
        began = time.monotonic()
        with cache.building(recipe.name, key) as temporary:
            facts = recipe.make(context, temporary)
            if recipe.key() != key:
                raise BuildError(f"what {recipe.name} is built from changed meanwhile; run the build again")
            seconds = round(time.monotonic() - began, 1)
            _write_manifest(recipe, key, facts, seconds, temporary)
    reporter.say(f"{recipe.name}: built in {seconds:.1f} s")
    return Built(recipe.name, folder / recipe.product, True, seconds)


def _write_manifest(recipe: Recipe, key: str, facts: Facts, seconds: float, folder: Path) -> None:
    manifest = {
        "name": recipe.name,
        "key": key,
        "vfu_dev": vfu_dev.__version__,
        "inputs": recipe.inputs(),
        "after": {dependency.name: dependency.key() for dependency in recipe.after},
        "facts": facts,
        "seconds": seconds,
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": _files(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _files(folder: Path) -> dict[str, dict[str, object]]:
    """Return relative path -> size and sum of every file under `folder`; links are not followed."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def damage(folder: Path) -> list[str]:
    """Return the files of the artifact in `folder` that differ from its manifest; reads all of them."""
    recorded = read_manifest(folder).get("files")
    if not isinstance(recorded, dict):
        return [f"no {MANIFEST} that lists what should be there"]
    there = _files(folder)
    gone = [f"{name} is gone" for name in recorded if name not in there]
    changed = [
        f"{name} differs from what was built"
        for name, found in recorded.items()
        if name in there and there[name] != found
    ]
    return gone + changed


def read_manifest(folder: Path) -> dict[str, object]:
    """Return the manifest of the artifact in `folder`; empty when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest: dict[str, object] = json.loads(path.read_text())
    return manifest
