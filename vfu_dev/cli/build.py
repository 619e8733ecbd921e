"""`vfu-dev build`: fetch, check, patch and build the native parts."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vfu_dev.builds import DEFAULT, BuildOptions, Cache, build, recipe_named
from vfu_dev.builds.recipes import RECIPES
from vfu_dev.cli.output import json_option, show_or_write
from vfu_dev.cli.params import NumberType
from vfu_dev.cli.shape import TO_STDOUT, Command


def _table() -> str:
    width = max(len(name) for name in RECIPES)
    return "\n".join(f"  {name:{width}}  {recipe.summary}" for name, recipe in RECIPES.items())


@click.command(
    cls=Command,
    help="Build the artifacts NAME..., by default those that the main job needs: "
    f"{', '.join(DEFAULT)}. Those already in the cache are left alone.\n\n\b\n{_table()}",
    examples=["vfu-dev build", "vfu-dev build qemu --sources ~/qemu-source --jobs 4"],
)
@click.argument("names", nargs=-1, type=click.Choice(list(RECIPES)), metavar="[NAME]...")
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
@click.option("--jobs", "-j", type=NumberType(low=1), help="Parallel jobs.  [default: all processors]")
@json_option("Write the state of the artifacts as JSON", any_word=False)
def command(
    names: tuple[str, ...],
    everything: bool,
    again: bool,
    sources: Path | None,
    jobs: int | None,
    json_path: str | None,
) -> None:
    """Build the artifacts that were asked for, one after another."""
    started = time.monotonic()
    chosen = [recipe_named(name) for name in (RECIPES if everything else names or DEFAULT)]
    options = BuildOptions.from_environment(jobs=jobs or 0, sources=sources.absolute() if sources else None)
    cache = Cache()
    results = [build(recipe, cache, options, again=again) for recipe in chosen]
    found = [
        {"name": one.name, "path": str(one.path), "built": one.built, "seconds": round(one.seconds, 3)}
        for one in results
    ]
    text = "\n".join(f"{one.name}: {one.path}" for one in results)
    show_or_write({"artifacts": found}, json_path, lambda: text)
    if json_path == TO_STDOUT:
        return
    if not any(one.built for one in results):
        click.echo(f"all up to date ({time.monotonic() - started:.2f} s)", err=True)
