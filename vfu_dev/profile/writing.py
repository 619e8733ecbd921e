"""A profile as the text of a TOML file; what is not known is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vfu_dev.profile.kinds import SECONDS_SPREAD, Kind, keys_of
from vfu_dev.profile.model import FORMAT_VERSION, Profile
from vfu_dev.profile.reading import SIDES, TABLES
from vfu_dev.profile.session import PHASES
from vfu_dev.profile.values import Mark, Value


def profile_text(profile: Profile) -> str:
    """Return the file for `profile`; reading it gives the same profile."""
    lines = [f"version = {FORMAT_VERSION}", *_lines(profile)]
    for table in TABLES:
        lines += _table(table, getattr(profile, table))
        if table == "writes":
            for side in SIDES:
                lines += _arcs(f"arcs.{side}", getattr(profile, f"{side}_arcs"))
        if table == "loading":
            for event in profile.reinits:
                lines += ["", "[[reinit]]", *_lines(event)]
    return "\n".join(lines) + "\n"


def _table(name: str, table: Any) -> list[str]:
    lines = _lines(table)
    found = ["", f"[{name}]", *lines] if lines else []
    for phase in PHASES if name in ("reads", "writes") else ():
        found += _table(f"{name}.{phase}", getattr(table, phase))
    return found


def _arcs(name: str, arcs: Mapping[str, Value[Any]]) -> list[str]:
    lines = [f"{json.dumps(arc)} = {_marked(SECONDS_SPREAD, value)}" for arc, value in arcs.items()]
    return ["", f"[{name}]", *lines] if lines else []


def _lines(table: Any) -> list[str]:
    """Return the lines of a table's own keys that are known and not what they are without it."""
    lines = []
    cls: Any = type(table)
    for name, key in keys_of(cls).items():
        value = getattr(table, name)
        if value is None or value == cls.__dataclass_fields__[name].default:
            continue
        lines.append(f"{name} = {_marked(key.kind, value) if key.marked else key.kind.text(value)}")
    return lines


def _marked(kind: Kind, value: Value[Any]) -> str:
    if value.mark is not Mark.BOUNDED:
        return f"{{ {value.mark} = {kind.text(value.value)} }}"
    bounds = (("at_least", value.lowest), ("at_most", value.highest))
    return f"{{ {', '.join(f'{word} = {kind.text(one)}' for word, one in bounds if one is not None)} }}"
