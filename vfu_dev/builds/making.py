"""How the cache's artifacts are made from recipes: by one process, whole, and with a manifest."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import vfu_dev
from vfu_dev.builds import fetch, packages
from vfu_dev.builds.cache import Cache, file_digest
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.progress import Reporter, default_reporter
from vfu_dev.builds.recipe import MANIFEST, Facts, Recipe, read_manifest
from vfu_dev.errors import BuildError


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
