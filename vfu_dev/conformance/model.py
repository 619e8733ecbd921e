"""A check: a claim about a server, its sentence in the specification, and its weight (must to optional)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vfu_dev.errors import ProtocolError


class Level(StrEnum):
    """How much a check matters.

    MUST: the specification or `<linux/vfio.h>` says so outright. SHOULD: they recommend it, or a client that
    follows them would be surprised. OPTIONAL: a server may leave it out, and a client does better with it.
    """

    MUST = "must"
    SHOULD = "should"
    OPTIONAL = "optional"


class Status(StrEnum):
    """Result of a check. SKIP: it does not apply to this server, for the reason given."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Source:
    """The sentence that a check cites: a document, a section or structure in it, and the words."""

    document: str
    section: str
    quote: str


SPECIFICATION = "vfio-user.rst (QEMU 10.2)"
NEWER_SPECIFICATION = "vfio-user.rst (July 2026)"
KERNEL = "<linux/vfio.h>"
ADDITIONS = "vfio-user-migration.rst (vfu-dev)"
PCI = "PCI Local Bus Specification 3.0"


def spec(section: str, quote: str) -> Source:
    """Return a sentence of the vfio-user specification, as QEMU 10.2 ships it."""
    return Source(SPECIFICATION, section, quote)


def kernel(section: str, quote: str) -> Source:
    """Return a sentence of `<linux/vfio.h>`, as the pinned QEMU tree has it."""
    return Source(KERNEL, section, quote)


class CheckFailedError(ProtocolError):
    """The server is not as the check claims."""


class NoAnswerError(CheckFailedError):
    """The server did not answer within the time that the check has."""


class ClosedError(CheckFailedError):
    """The server closed the connection."""


class NotApplicableError(Exception):
    """The check is about something that this server does not have."""


Run = Callable[[Any], None]  # takes a Session, which is made of what is here


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        fresh: it opens its own connections, so the shared connection is closed first.
    """

    name: str
    group: str
    level: Level
    source: Source
    about: str
    run: Run
    fresh: bool = False


@dataclass(frozen=True)
class Result:
    """Result of one check; `detail` says what was found, or why the check does not apply."""

    check: Check
    status: Status
    detail: str
    seconds: float

    @property
    def broken(self) -> bool:
        """Whether this is a must that failed."""
        return self.status is Status.FAIL and self.check.level is Level.MUST

    def as_json(self) -> dict[str, Any]:
        """Return the result for `--json`."""
        source = self.check.source
        return {
            "name": self.check.name,
            "group": self.check.group,
            "level": self.check.level.value,
            "status": self.status.value,
            "detail": self.detail or None,
            "about": self.check.about,
            "source": {"document": source.document, "section": source.section, "quote": source.quote},
            "seconds": round(self.seconds, 3),
        }


CHECKS: dict[str, Check] = {}


def add(check: Check) -> None:
    """Add a check to the table. Raises: ValueError: there is one of that name."""
    if CHECKS.setdefault(check.name, check) is not check:
        raise ValueError(f"two checks are called {check.name}")


def group_of(module: str) -> str:
    """Return the group of the checks in a module: the end of the module's name."""
    return module.rpartition(".checks_")[2]


def check(level: Level, source: Source, *, fresh: bool = False) -> Callable[[Run], Run]:
    """Add a function to the table of checks, with its name and its docstring as the claim."""

    def enter(run: Run) -> Run:
        group = group_of(run.__module__)
        about = (inspect.getdoc(run) or "").partition("\n")[0]
        add(Check(run.__name__.replace("_", "-"), group, level, source, about, run, fresh))
        return run

    return enter


def require(condition: object, what: str) -> None:
    """Raise CheckFailedError saying `what` was found unless `condition`."""
    if not condition:
        raise CheckFailedError(what)
