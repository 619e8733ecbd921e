"""`vfu-dev build`: fetch, check, patch and build the native parts."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vfu_dev.builds import DEFAULT, Cache, recipe_named
from vfu_dev.builds.making import BuildOptions, build
from vfu_dev.builds.prune import prune
from vfu_dev.builds.recipes import RECIPES
from vfu_dev.cli.output import json_option, show_or_write
from vfu_dev.cli.params import NumberType
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.errors import ConfigError
from vfu_dev.sizes import format_count, format_size


def _table() -> str:
    width = max(len(name) for name in RECIPES)
    return "\n".join(f"  {name:{width}}  {recipe.summary}" for name, recipe in RECIPES.items())


@click.command(
    cls=Command,
    help="Build the artifacts NAME..., by default those that the main job needs: "
    f"{', '.join(DEFAULT)}. Those already in the cache are left alone.\n\n\b\n{_table()}",
    examples=[
        "vfu-dev build",
        "vfu-dev build qemu --sources ~/qemu-source --jobs 4",
        "vfu-dev build --prune --yes",
    ],
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
@click.option(
    "--prune",
    "prunes",
    is_flag=True,
    help="Build nothing. List the artifacts in the cache that no recipe of this vfu-dev names, with their "
    "sizes; another checkout or version may still use them.",
)
@click.option("--yes", is_flag=True, help="With --prune: remove them, except for what is being built.")
@json_option("Write the state of the artifacts as JSON", any_word=False)
def command(
    names: tuple[str, ...],
    everything: bool,
    again: bool,
    sources: Path | None,
    jobs: int | None,
    prunes: bool,
    yes: bool,
    json_path: str | None,
) -> None:
    """Build the artifacts that were asked for, one after another."""
    if yes and not prunes:
        raise ConfigError("--yes: is for --prune")
    if prunes:
        if names or everything or again or sources or jobs:
            raise ConfigError("--prune: builds nothing; of the other options it takes --yes and --json only")
        _prune(yes, json_path)
        return
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


def _prune(remove: bool, json_path: str | None) -> None:
    """List or remove what no recipe names."""
    found = list(prune(Cache(), RECIPES.values(), remove=remove))
    lines = [
        f"{format_size(one.size_bytes):>10}  {one.path}{'' if one.state == 'there' else f'  {one.state}'}"
        for one in found
    ]
    counted = [one for one in found if one.state != "locked"]
    total = sum(one.size_bytes for one in counted)
    done = "removed" if remove else "to remove, with --yes"
    lines.append(f"{format_count(len(counted), 'artifact')}, {format_size(total)} {done}")
    value = {
        "artifacts": [
            {"path": str(one.path), "size_bytes": one.size_bytes, "state": one.state} for one in found
        ],
        "size_bytes": total,
    }
    show_or_write(value, json_path, lambda: "\n".join(lines))
