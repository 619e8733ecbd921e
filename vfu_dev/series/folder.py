"""The folder of a run: what it holds, whether it belongs to a run, and its summary.

`scenario.toml` as run; `form.json`, what all of its parts share; `points/NAME.csv` and `.json` of each
finished point; `moves.csv`, all moves; `summary.json`; `failures/`, logs of the first moves that went wrong.
An interrupted point has no `.json` yet and is run again from its beginning: its VM is gone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfu_dev.errors import ConfigError
from vfu_dev.series.parts import Shard, groups_of
from vfu_dev.series.rows import Row, read_rows, write_rows
from vfu_dev.series.scenario import Point, Scenario
from vfu_dev.series.summary import SUMMARY, machine, read_json, summarise, write_json

FORM, SCENARIO, POINTS, FAILURES = "form.json", "scenario.toml", "points", "failures"
# Number of failed moves whose logs are kept.
KEPT_FAILURES = 5


class RunFolder:
    """The folder of one run.

    Args:
        made_with: `versions` and `qemus` of the run: parts that differ in them do not belong together.
        shard: the part of the run that is made here, of the groups that `groups` lists; None: all of it.

    Attributes: `points`: those to be made here.
    """

    def __init__(
        self,
        path: Path,
        scenario: Scenario,
        short: bool,
        made_with: Mapping[str, Any],
        shard: Shard | None = None,
        groups: Sequence[Sequence[Point]] | None = None,
    ) -> None:
        self.path, self.scenario, self.short = path, scenario, short
        self.groups = list(groups_of(scenario.chosen(short)) if groups is None else groups)
        self.points = [point for group in self.groups for point in group]
        self.form: dict[str, Any] = {
            "scenario": scenario.name,
            "short": short,
            "changes": dict(scenario.changes),
            "shard": None if shard is None else str(shard),
            **{name: dict(made_with[name]) for name in ("versions", "qemus")},
        }
        self._kept: dict[str, Any] = {}

    def prepare(self, *, resume: bool = False, force: bool = False, started: float | None = None) -> None:
        """Make the folder, or check that the existing one belongs to this run.

        Args: resume: go on with what is in it. force: delete the run that it holds.
              started: when the run began, seconds since 1970; by default now.
        Raises: ConfigError: it holds something else.
        """
        kept = self.path / SCENARIO
        is_run = kept.is_file() and (self.path / FORM).is_file()
        # A run that failed before its first move has no results to lose.
        if is_run and not resume and (force or not self._has_moves()):
            shutil.rmtree(self.path)
        if kept.exists():
            if not resume:
                raise ConfigError(
                    f"{self.path}: holds a run already; --resume goes on with it, --force starts anew"
                )
            if differs := differing(read_part(self.path), self.whole_form()):
                raise ConfigError(
                    f"{self.path}: holds another run, with other {', '.join(differs)}; "
                    "--force starts anew, --out chooses another folder"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path}: not empty, and no run of a scenario; choose another folder")
        (self.path / POINTS).mkdir(parents=True, exist_ok=True)
        earlier = read_json(self.path / FORM) if kept.exists() else {}
        # A resumed run keeps the time of its beginning.
        began = min(time.time() if started is None else started, earlier.get("started", float("inf")))
        self._kept = {**self.form, "started": began}
        write_json(self.path / FORM, self._kept)
        kept.write_text(self.scenario.text, encoding="utf-8")

    def whole_form(self) -> dict[str, Any]:
        """Return the form, and the scenario's text with it."""
        return {**self.form, SCENARIO: self.scenario.text}

    def _has_moves(self) -> bool:
        return any(read_rows(path) for path in (self.path / POINTS).glob("*.csv"))

    def rows_path(self, point: Point) -> Path:
        """Return the file with the moves of a point."""
        return self.path / POINTS / f"{point.name}.csv"

    def entry_path(self, point: Point) -> Path:
        """Return the file that a finished point has, beside its moves."""
        return self.path / POINTS / f"{point.name}.json"

    def finished(self, group: Sequence[Point]) -> bool:
        """Return whether all points of `group` were made, and as they are to be made now."""
        return all(self._finished(point) for point in group)

    def _finished(self, point: Point) -> bool:
        if not self.entry_path(point).exists() or not self.rows_path(point).exists():
            return False
        found = read_json(self.entry_path(point))
        same = json.loads(json.dumps(point.to_dict()))
        return bool(all(found.get(key) == value for key, value in same.items()))

    def todo(self) -> list[list[Point]]:
        """Return the groups that are not finished."""
        return [list(group) for group in self.groups if not self.finished(group)]

    def plan(self) -> dict[str, int]:
        """Return how much there is to do, for a reporter: points, moves, moves that are done."""
        moves = sum(point["run.moves"] for point in self.points)
        left = sum(point["run.moves"] for group in self.todo() for point in group)
        return {"points": len(self.points), "moves": moves, "done": moves - left}

    def complete(self, command: Sequence[str]) -> dict[str, Any]:
        """Write moves.csv and summary.json, now that every point is finished; return the summary."""
        shutil.rmtree(self.path / "logs", ignore_errors=True)
        rows: list[Row] = [row for point in self.points for row in read_rows(self.rows_path(point))]
        write_rows(self.path / "moves.csv", rows)
        points = [read_json(self.entry_path(point)) for point in self.points]
        machines: dict[str, Any] = {}
        for point in points:
            machines.setdefault(point["machine"]["id"], point["machine"])
        told = (point["libvfio_user"] for point in points)
        facts = {
            "versions": {**self.form["versions"], "libvfio-user": next((one for one in told if one), "")},
            # Of the first point; its load average is that of when the point began.
            "machine": points[0]["machine"] if points else machine(),
            "machines": list(machines.values()),
            "command": list(command),
            "changes": {key: str(value) for key, value in self.form["changes"].items()},
            "started": self._kept["started"],
            "ended": max((point["ended"] for point in points), default=time.time()),
            "shard": self.form["shard"],
        }
        summary = summarise(self.scenario, self.short, points, rows, facts)
        write_json(self.path / SUMMARY, summary)
        return summary


def read_part(path: Path) -> dict[str, Any]:
    """Return the form of the run that a folder holds, and the scenario's text. Raises: ConfigError."""
    form = read_json(path / FORM)
    if not isinstance(form, dict):
        raise ConfigError(f"{path / FORM}: not of a run of `vfu-dev lab run`")
    try:
        return {**form, SCENARIO: (path / SCENARIO).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path / SCENARIO}: cannot be read: {error}") from error


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys of `other` whose value `one` does not have; of tables and words, with both values."""
    found = []
    for key, wanted in other.items():
        value = one.get(key)
        if isinstance(wanted, Mapping) and isinstance(value, Mapping):
            names = dict.fromkeys((*value, *wanted))
            changed = [name for name in names if value.get(name) != wanted.get(name)]
            found += [f"{name} ({value.get(name)} instead of {wanted.get(name)})" for name in changed]
        elif value != wanted:
            found.append(key)
    return found
