"""Joins parts of a run, made by `vfu-dev lab run --shard` on one machine or many, into one result."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfu_dev.errors import ConfigError, LabError
from vfu_dev.series.folder import (
    FAILURES,
    FORM,
    KEPT_FAILURES,
    POINTS,
    SCENARIO,
    RunFolder,
    differing,
    read_part,
)
from vfu_dev.series.rows import read_rows
from vfu_dev.series.scenario import Point, parse
from vfu_dev.series.summary import read_json
from vfu_dev.whole import write_whole

# Number of missing points that an error names.
NAMED = 8


def find_parts(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Return scenario -> result folders: of those given, each a result or the `--out` of `lab run`.

    Raises: ConfigError: one has no result.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders:
        here = (
            [folder] if (folder / FORM).exists() else sorted(path.parent for path in folder.glob(f"*/{FORM}"))
        )
        if not here:
            raise ConfigError(f"{folder}: no result of `vfu-dev lab run` in it")
        for path in here:
            found.setdefault(str(read_part(path).get("scenario")), []).append(path)
    return found


def merge(
    parts: Sequence[Path], out: Path, *, force: bool = False, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Join parts of one run and return the summary, which is also `out`/summary.json.

    Args: out: made; or the result of an earlier merge of the same run, which gets what it lacks.
          force: delete the run that `out` holds.
    Raises: ConfigError: the parts are not of one run, or a point was made twice.
            LabError: points are missing: `out` has the others; a further merge, or `lab run --resume`, goes
            on with it.
    """
    forms = [read_part(path) for path in parts]
    first = forms[0]
    try:
        made_with = {name: first[name] for name in ("versions", "qemus")}
        text, changes, short = first[SCENARIO], first["changes"], first["short"]
        started = min(form["started"] for form in forms)
    except KeyError as error:
        raise ConfigError(
            f"{parts[0] / FORM}: has no {error}: made by a version that had no shards"
        ) from None
    scenario = parse(text, first["scenario"], str(parts[0] / SCENARIO), changes)
    folder = RunFolder(out, scenario, short, made_with)
    wanted = {key: value for key, value in folder.whole_form().items() if key != "shard"}
    for path, form in zip(parts, forms, strict=True):
        if differs := differing(form, wanted):
            raise ConfigError(f"{path} and {parts[0]} are not of one run: {', '.join(differs)}")
    folder.prepare(resume=not force, force=force, started=started)
    homes = [(group, _home(folder, group, parts)) for group in folder.groups]
    found = [(group, home) for group, home in homes if home is not None]
    _require_one_library([home for _, home in found])
    for group, home in found:
        take(folder, home, group)
    if missing := [point.name for group in folder.todo() for point in group]:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        shards = ", ".join(sorted({str(form.get("shard") or "the whole run") for form in forms}))
        raise LabError(
            f"{out}: {len(missing)} of {len(folder.points)} points are missing: {', '.join(missing[:NAMED])}"
            f"{more}; there are: {shards}. The others are kept: merge the missing shards into it, or run the "
            f"same scenario with --resume --out {out.parent}"
        )
    return folder.complete(command)


def take(folder: RunFolder, home: Path, group: Sequence[Point]) -> None:
    """Copy a finished group from the folder `home` into `folder`, with logs of moves that went wrong.

    Raises: ConfigError: a file of it is cut off.
    """
    if home == folder.path:
        return
    for point in group:
        rows, entry = (
            path.relative_to(folder.path) for path in (folder.rows_path(point), folder.entry_path(point))
        )
        if len(read_rows(home / rows)) != read_json(home / entry)["moves"]:
            raise ConfigError(f"{home / rows}: does not have all moves that {entry} counts")
        for name in (rows, entry):
            write_whole(folder.path / name, (home / name).read_text(encoding="utf-8"))
        for logs in sorted((home / FAILURES).glob(f"{point.name}-move*")):
            kept = folder.path / FAILURES
            if not (kept / logs.name).exists() and len(list(kept.glob("*"))) < KEPT_FAILURES:
                shutil.copytree(logs, kept / logs.name)


def _home(folder: RunFolder, group: Sequence[Point], parts: Sequence[Path]) -> Path | None:
    """Return the part that has all of `group`; None: there is none. Raises: ConfigError: two parts have."""
    homes: dict[Path, list[Mapping[str, Any]]] = {}
    for path in dict.fromkeys((folder.path, *parts)):
        part = RunFolder(path, folder.scenario, folder.short, folder.form)
        if part.finished(group):
            homes[path] = [read_json(part.entry_path(point)) for point in group]
    first = next(iter(homes), None)
    for path, entries in homes.items():
        if first is not None and entries != homes[first]:
            raise ConfigError(
                f"{group[0].name} was made twice: in {first} and, differently, in {path}; leave one out"
            )
    return first


def _require_one_library(homes: Sequence[Path]) -> None:
    """Raise ConfigError if the servers of two parts had different libraries; only their answers say which."""
    told: dict[str, Path] = {}
    for home in dict.fromkeys(homes):
        for path in sorted((home / POINTS).glob("*.json")):
            if version := read_json(path).get("libvfio_user"):
                told.setdefault(version, home)
    if len(told) > 1:
        both = " and ".join(f"{version} in {home}" for version, home in told.items())
        raise ConfigError(f"the parts have different versions of libvfio-user: {both}")
