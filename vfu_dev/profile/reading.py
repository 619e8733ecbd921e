"""A profile from a TOML file, checked: an error names file, line and key, and says what is allowed there."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from vfu_dev.errors import ConfigError, nearest, written
from vfu_dev.profile.contradictions import contradictions
from vfu_dev.profile.kinds import SECONDS_SPREAD, Key, keys_of, marked
from vfu_dev.profile.model import (
    FORMAT_VERSION,
    Calls,
    Content,
    Contention,
    Dirty,
    DmaLogging,
    Features,
    Initial,
    Loading,
    MigrationSettings,
    Phases,
    Profile,
    Reads,
    Recorded,
    Reinit,
    StopCopy,
)
from vfu_dev.profile.session import PHASES
from vfu_dev.profile.values import Distribution, Mark, Value
from vfu_dev.toml_source import Source, parse_toml
from vfu_dev.uapi import DeviceState

T = TypeVar("T")

MAX_FILE_BYTES = 8 << 20
MAX_REINITS = 1000
_MAX_CONTRADICTIONS = 50  # lines of an error

# Tables of one class each; `arcs` and `reinit` have forms of their own.
TABLES: dict[str, Any] = {
    "features": Features,
    "initial": Initial,
    "dirty": Dirty,
    "stop_copy": StopCopy,
    "reads": Reads,
    "writes": Phases,
    "loading": Loading,
    "dma_logging": DmaLogging,
    "contention": Contention,
    "content": Content,
    "migration": MigrationSettings,
    "recorded": Recorded,
}
SIDES = ("source", "destination")


def read_profile(path: str | Path) -> Profile:
    """Return the profile in a file.

    Raises: ConfigError: it cannot be read, or says something impossible.
    """
    try:
        found = os.stat(path)
        # Reading a device or a pipe might never end, and the reader may be a server.
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: not a file of at most {MAX_FILE_BYTES >> 20} MiB")
        text = Path(path).read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    return parse_profile(text, str(path))


def parse_profile(text: str, name: str) -> Profile:
    """Return the profile that `text` describes.

    Args: name: what errors call it.
    Raises: ConfigError: line, key, and what is allowed there.
    """
    source = Source(name, text)
    raw = parse_toml(name, text)
    version = raw.pop("version", None)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise source.error("version", f"expected version = {FORMAT_VERSION}, the only one so far")
    top = keys_of(Profile)
    _known(source, "", raw, [*top, *TABLES, "arcs", "reinit"])
    members: dict[str, Any] = _members(source, "", {key: raw[key] for key in top if key in raw}, top)
    for table, cls in TABLES.items():
        members[table] = _table(source, table, raw.get(table, {}), cls)
    arcs = _mapping(source, "arcs", raw.get("arcs", {}))
    _known(source, "arcs", arcs, SIDES)
    for side in SIDES:
        members[f"{side}_arcs"] = _arcs(source, f"arcs.{side}", arcs.get(side, {}))
    members["reinits"] = _reinits(source, raw.get("reinit", []))
    profile = Profile(**members)
    _refuse_contradictions(source, profile)
    return profile


def _table(source: Source, at: str, value: Any, cls: Any) -> Any:
    table = dict(_mapping(source, at, value))
    phases = {}
    if issubclass(cls, Phases):
        phases = {name: _table(source, f"{at}.{name}", table.pop(name, {}), Calls) for name in PHASES}
    keys = keys_of(cls)
    _known(source, at, table, [*keys, *phases])
    return cls(**phases, **_members(source, f"{at}.", table, keys))


def _members(
    source: Source, prefix: str, table: Mapping[str, Any], keys: Mapping[str, Key]
) -> dict[str, Any]:
    return {
        name: _marked(source, prefix + name, value, keys[name])
        if keys[name].marked
        else _parsed(source, prefix + name, value, keys[name])
        for name, value in table.items()
    }


def _marked(source: Source, at: str, value: Any, key: Key) -> Value[Any]:
    bounds = ("at_least", "at_most") if key.kind.ordered else ()
    words = (Mark.MEASURED.value, Mark.ASSUMED.value, *bounds)
    if not isinstance(value, dict) or not value:
        raise source.error(at, f"expected {{ {words[0]} = ... }}, or {', '.join(words[1:])} instead")
    _known(source, at, value, words)
    if len(value) > 1 and not set(value) <= set(bounds):
        raise source.error(at, f"has {' and '.join(value)}; expected one of them")
    found = {word: _parsed(source, f"{at}.{word}", one, key) for word, one in value.items()}
    if Mark.MEASURED in found:
        return Value.measured(found[Mark.MEASURED])
    if Mark.ASSUMED in found:
        return Value.assumed(found[Mark.ASSUMED])
    low, high = found.get("at_least"), found.get("at_most")
    if low is not None and high is not None and _size(low) > _size(high):
        raise source.error(at, "at_least is more than at_most")
    return Value.bounded(at_least=low, at_most=high)


def _size(value: Any) -> float:
    return value.mean if isinstance(value, Distribution) else value


def _parsed(source: Source, at: str, value: Any, key: Key) -> Any:
    try:
        return key.kind.parse(value)
    except (ValueError, TypeError, OverflowError):
        raise source.error(at, f"{written(value)}: expected {key.kind.allowed}") from None


def _arcs(source: Source, at: str, value: Any) -> dict[str, Value[Distribution]]:
    key = marked(SECONDS_SPREAD, "how long it takes")
    found = {}
    for arc, one in _mapping(source, at, value).items():
        origin, _, target = arc.partition("->")
        if origin not in DeviceState.__members__ or target not in DeviceState.__members__:
            names = ", ".join(DeviceState.__members__)
            raise source.error(f"{at}.{arc}", f'expected "FROM->TO", each one of {names}')
        found[arc] = _marked(source, f"{at}.{arc}", one, key)
    return found


def _reinits(source: Source, value: Any) -> tuple[Reinit, ...]:
    if not isinstance(value, list) or len(value) > MAX_REINITS:
        raise source.error("reinit", f"expected tables [[reinit]], {MAX_REINITS} at most")
    found = []
    for number, one in enumerate(value, 1):
        at = f"reinit[{number}]"
        event = _table(source, at, one, Reinit)
        if event.seconds is None or event.bytes is None:
            raise source.error(at, "expected seconds and bytes")
        found.append(event)
    return tuple(found)


def _mapping(source: Source, at: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise source.error(at, f"expected a table: [{at}]")
    return value


def _known(source: Source, at: str, table: Mapping[str, Any], names: Any) -> None:
    for key in table:
        if key not in names:
            near = nearest(key[:60], names)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
            raise source.error(f"{at}.{key}" if at else key, f"no such key; {hint}")


def _refuse_contradictions(source: Source, profile: Profile) -> None:
    """Raises: ConfigError: the profile contradicts itself; the first contradictions, each with its line."""
    found = contradictions(profile)
    errors = [source.error(one.key, one.text) for one in found[:_MAX_CONTRADICTIONS]]
    if len(found) == 1:
        raise errors[0]
    if found:
        lines = [f"{source.name}: {len(found)} contradictions:", *map(str, errors)]
        if more := len(found) - len(errors):
            lines.append(f"and {more} more")
        raise ConfigError("\n  ".join(lines))
