"""What of a run can be made apart from the rest: groups of points, and shards, which are some of the groups.

The points of a group differ in their variant alone. Their VMs are moved in turns on one machine, so that
other work disturbs all of them alike; a group is never divided.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vfu_dev.errors import ConfigError
from vfu_dev.series.scenario import Point

T = TypeVar("T")


def groups_of(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points of each combination of swept values, in order."""
    return [list(group) for _, group in itertools.groupby(points, lambda point: list(point.sweep.items()))]


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1 on: every `count`-th group."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that `I/N` names. Raises: ConfigError: it names none."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"shard {text!r}: expected I/N, with I from 1 to N, such as 1/4 to 4/4")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def take(self, groups: Sequence[T], before: int = 0) -> list[T]:
        """Return its share of `groups`; `before`: the groups of other scenarios that were dealt already."""
        return [one for at, one in enumerate(groups, before) if at % self.count == self.number - 1]
