"""Rules that change QEMU's migration parameters in the course of a migration, as management software does.

A rule is a condition and what it sets, written like a fault: `passes=3,seconds=10,downtime-limit=300`. It
acts once in a migration. docs/policies.md is the format's definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfu_dev.errors import ConfigError
from vfu_dev.lab.stall import StallDetector
from vfu_dev.sizes import format_size, parse_bandwidth

# VEP 248's default of `stallMargin`.
STALL_MARGIN_PERCENT = 4.0
MAX_SECONDS = 3600.0
# The status of query-migrate in which the source's VM runs and passes are made.
PASSING = "active"
# What a stall is judged by: RAM alone, which is all that QEMU reports before 11.1, or RAM and devices.
REMAINING = ("ram", "all")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"{text!r}: expected a whole number from {low} to {high}")
        return int(text)

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ValueError(f"{text!r}: expected a number from {low:g} to {high:g}")
        return number

    return parse


def _remaining(text: str) -> str:
    if text not in REMAINING:
        raise ValueError(f"{text!r}: expected one of {', '.join(REMAINING)}")
    return text


_PERCENT = _whole(1, 99)
# What QEMU 10 obeys when it is set while a migration runs (migration/options.c, migration/cpu-throttle.c).
PARAMETERS: Mapping[str, Callable[[str], int]] = {
    "downtime-limit": _whole(1, 2_000_000),
    "max-bandwidth": parse_bandwidth,
    "avail-switchover-bandwidth": parse_bandwidth,
    "throttle-trigger-threshold": _whole(1, 100),
    "cpu-throttle-initial": _PERCENT,
    "cpu-throttle-increment": _PERCENT,
    "max-cpu-throttle": _PERCENT,
}
CONDITIONS: Mapping[str, Callable[[str], Any]] = {
    "passes": _whole(1, 1_000_000),
    "seconds": _number(0, MAX_SECONDS),
    "stall": _number(0.1, MAX_SECONDS),
    "margin": _number(0, 100),
    "remaining": _remaining,
}


class RuleError(ConfigError):
    """A rule that cannot be understood. `rule` is its text."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"rule {rule!r}: {text}")
        self.rule = rule


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        passes: from this pass on (QEMU's dirty-sync-count, 1 in the first); None: from the start.
        seconds: time after the beginning of that pass, or of the migration.
        stall: the stall detector's window in seconds; None: the rule does not wait for a stall.
        margin: the detector's margin, percent.
        remaining: what the detector looks at, one of `REMAINING`.
        parameters: name in QMP -> value.
    """

    text: str
    passes: int | None = None
    seconds: float = 0.0
    stall: float | None = None
    margin: float = STALL_MARGIN_PERCENT
    remaining: str = "ram"
    parameters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Return the rule that `key=value,key=value` describes.

        Raises: RuleError: names the key and what is allowed.
        """
        found: dict[str, Any] = {}
        parameters: dict[str, int] = {}
        for part in text.split(","):
            key, equals, value = (word.strip() for word in part.partition("="))
            if key in found or key in parameters:
                raise RuleError(text, f"{key} twice")
            known = CONDITIONS.get(key) or PARAMETERS.get(key)
            if known is None or not equals:
                allowed = f"{', '.join(CONDITIONS)}, or what is set: {', '.join(PARAMETERS)}"
                raise RuleError(text, f"{part.strip()!r}: expected KEY=VALUE, the key one of {allowed}")
            try:
                (parameters if key in PARAMETERS else found)[key] = known(value)
            except ValueError as error:
                raise RuleError(text, f"{key}: {error}") from None
        if not parameters:
            raise RuleError(text, f"sets nothing: add one of {', '.join(PARAMETERS)}")
        if not found.keys() & {"passes", "seconds", "stall"}:
            raise RuleError(text, "does not say when: add passes=, seconds= or stall=")
        if "stall" not in found and (stray := found.keys() & {"margin", "remaining"}):
            raise RuleError(text, f"{', '.join(sorted(stray))}: only with stall=")
        return cls(text, **found, parameters=parameters)


@dataclass(frozen=True)
class Instant:
    """Where a migration is. `seconds` since it began, by QEMU's clock; bytes that remain, RAM and all."""

    seconds: float
    passes: int
    ram_bytes: float
    all_bytes: float


class _Pending:
    """A rule that has not acted yet."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._since: float | None = None
        self._passes = 0
        self._stall = None if rule.stall is None else StallDetector(rule.stall, rule.margin / 100)

    def is_due(self, now: Instant) -> bool:
        """Take the next instant; return whether the rule acts."""
        began, self._passes = now.passes > self._passes, now.passes
        if self._since is None and now.passes >= (self.rule.passes or 0):
            self._since = now.seconds if self.rule.passes is not None else 0.0
        if self._since is None or now.seconds < self._since + self.rule.seconds:
            return False
        if self._stall is None:
            return True
        left = now.ram_bytes if self.rule.remaining == "ram" else now.all_bytes
        return began and self._stall.begin_pass(now.seconds, left)


class Policy:
    """The rules of one migration.

    Attributes:
        steps: what acted, in order: `time` (Unix), `seconds`, `passes`, `remaining_bytes`, `rule`, and
            `parameters`, by their names in QMP.
    """

    def __init__(self, rules: Sequence[str]) -> None:
        self.steps: list[dict[str, Any]] = []
        self._pending = [_Pending(Rule.parse(text)) for text in rules]

    def due(self, row: Mapping[str, Any], all_bytes: float) -> list[dict[str, Any]]:
        """Take a sample, and return the steps that it makes due, each once.

        Args: row: of `ObservedMove.sample`. all_bytes: what remains, devices included.
        """
        reply = row["qemu"]
        if reply.get("status") != PASSING or not self._pending:
            return []
        ram = reply["ram"]
        now = Instant(reply["total-time"] / 1000, ram["dirty-sync-count"], ram["remaining"], all_bytes)
        acting = [pending for pending in self._pending if pending.is_due(now)]
        self._pending = [pending for pending in self._pending if pending not in acting]
        steps = [
            {
                "time": row["time"],
                "seconds": now.seconds,
                "passes": now.passes,
                "remaining_bytes": round(all_bytes),
                "rule": pending.rule.text,
                "parameters": dict(pending.rule.parameters),
            }
            for pending in acting
        ]
        self.steps += steps
        return steps

    def changed(self) -> dict[str, int]:
        """Return the parameters as the steps so far have set them, underscores for hyphens."""
        return {
            name.replace("-", "_"): value for step in self.steps for name, value in step["parameters"].items()
        }


def step_text(step: Mapping[str, Any]) -> str:
    """Return what one step did, for people: `downtime-limit=300 (pass 4, 12.3 s, 8 MiB left)`."""
    what = ", ".join(f"{name}={value}" for name, value in step["parameters"].items())
    where = f"pass {step['passes']}, {step['seconds']:.1f} s, {format_size(step['remaining_bytes'])} left"
    return f"{what} ({where})"
