"""What another machine has to know to make a part of a run, and what it says of itself before it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from vfu_dev.series.artifacts import Artifacts
from vfu_dev.series.scenario import Scenario, parse
from vfu_dev.series.summary import machine


@dataclass(frozen=True)
class Work:
    """A run, in values that JSON has.

    Attributes:
        name, text, changes: of the scenario. short: whether its short form is run.
        asked: which QEMUs (see `Artifacts.find`), as found on the machine that makes the points.
    """

    name: str
    text: str
    short: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, str | None] = field(default_factory=lambda: {"qemu": None})

    def to_json(self) -> dict[str, Any]:
        """Return what `Work(**…)` takes."""
        return asdict(self)

    @cached_property
    def scenario(self) -> Scenario:
        """The scenario. Raises: ConfigError: a file that it names is not on this machine, say."""
        return parse(self.text, self.name, changes=self.changes)


def introduce(work: Work) -> dict[str, Any]:
    """Return what this machine would make the points with: `versions`, `qemus`, `machine`.

    Raises: VfuDevError: it cannot make them; says what to do.
    """
    points = work.scenario.chosen(work.short)
    artifacts = Artifacts.find(points, work.asked)
    return {
        "versions": artifacts.versions(points[0]),
        "qemus": artifacts.qemus(),
        "machine": machine(),
    }
