"""What `vfu-dev doctor` finds: facts for --json, and problems with what to do about each."""

from __future__ import annotations

from typing import Any

from vfu_dev.builds import BuildError, NotBuiltError
from vfu_dev.builds.recipe import OverrideError

Facts = dict[str, Any]


class Findings:
    """Collects facts for --json and problems with their remedies."""

    def __init__(self) -> None:
        self.facts: Facts = {}
        self.problems: list[dict[str, str]] = []

    def problem(self, what: str, fix: str) -> None:
        """Note a problem and the command, or the step, that solves it."""
        self.problems.append({"what": what, "fix": fix})

    def unbuilt(self, name: str, error: BuildError) -> None:
        """Note that artifact `name` cannot be used, for the reason `error`."""
        if isinstance(error, OverrideError):
            # Building would not help: as long as the variable is set, what is built is not looked at.
            self.problem(str(error), f"unset {error.variable}, or set it to one that exists")
        elif isinstance(error, NotBuiltError):
            self.problem(f"{name} is not built", f"vfu-dev build {name}")
        else:
            self.problem(str(error), f"vfu-dev build {name}")
