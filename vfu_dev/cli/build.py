"""`vfu-dev build`: fetch, check, patch and build what is native."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import click

from vfu_dev.builds import DEFAULT, RECIPES, Cache, Options, build, recipe_named


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the running command is stopped and what it left is removed.
    sys.exit(128 + number)


def _table() -> str:
    width = max(len(name) for name in RECIPES)
    return "\n".join(f"  {name:{width}}  {recipe.summary}" for name, recipe in RECIPES.items())


@click.command(
    help="Build the artifacts NAME..., by default those that the main job needs: "
    f"{', '.join(DEFAULT)}. Those already in the cache are left alone.\n\n\b\n{_table()}",
    epilog="Example: vfu-dev build qemu --sources ~/qemu-source",
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Build all of them.")
@click.option(
    "--again",
    is_flag=True,
    help="Build even what is in the cache, and replace it: for packages that have a newer version now, or a "
    "file that was damaged.",
)
@click.option(
    "--sources",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that holds the pinned source files; no network is used for them.  [env: VFU_DEV_SOURCES]",
)
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Parallel jobs.  [default: all processors]")
@click.option("--json", "as_json", is_flag=True, help="Print what there is now as JSON on stdout.")
def command(
    names: tuple[str, ...],
    everything: bool,
    again: bool,
    sources: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Build the artifacts that were asked for, one after another."""
    started = time.monotonic()
    chosen = [recipe_named(name) for name in (RECIPES if everything else names or DEFAULT)]
    options = Options.from_environment(jobs=jobs or 0, sources=sources.absolute() if sources else None)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        cache = Cache()
        results = [build(recipe, cache, options, again=again) for recipe in chosen]
    finally:
        signal.signal(signal.SIGTERM, previous)
    if as_json:
        found = [
            {"name": one.name, "path": str(one.path), "built": one.built, "seconds": round(one.seconds, 3)}
            for one in results
        ]
        click.echo(json.dumps({"artifacts": found}, indent=2))
        return
    for one in results:
        click.echo(f"{one.name}: {one.path}")
    if not any(one.built for one in results):
        click.echo(f"all up to date ({time.monotonic() - started:.2f} s)", err=True)
