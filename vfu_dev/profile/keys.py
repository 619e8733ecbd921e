"""Every value of a profile by its key in the file, for tables and comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vfu_dev.profile.kinds import SECONDS_SPREAD, Kind, keys_of
from vfu_dev.profile.model import Profile
from vfu_dev.profile.reading import SIDES, TABLES
from vfu_dev.profile.session import PHASES
from vfu_dev.profile.values import Value

# Tables that are no part of the device.
CONTEXT = ("migration", "recorded")


class Entry(NamedTuple):
    """A value that is known.

    Attributes:
        key: as in the file; the second `[[reinit]]` is `reinit[2]`.
        value: with its mark, or what a key without marks says.
    """

    key: str
    kind: Kind
    value: Value[Any] | Any

    @property
    def plain(self) -> Any:
        """The value without its mark."""
        return self.value.value if isinstance(self.value, Value) else self.value


def entries(profile: Profile, *, context: bool = False) -> Iterator[Entry]:
    """Yield what is known of the device, in the order of the file; `context`: of the recording too."""
    for name in TABLES:
        if name in CONTEXT and not context:
            continue
        table = getattr(profile, name)
        yield from _own(name, table)
        if name in ("reads", "writes"):
            for phase in PHASES:
                yield from _own(f"{name}.{phase}", getattr(table, phase))
        if name == "writes":
            for side in SIDES:
                for arc, value in getattr(profile, f"{side}_arcs").items():
                    yield Entry(f"arcs.{side}.{arc}", SECONDS_SPREAD, value)
        if name == "loading":
            for number, event in enumerate(profile.reinits, 1):
                yield from _own(f"reinit[{number}]", event)


def _own(name: str, table: Any) -> Iterator[Entry]:
    cls: Any = type(table)
    for key, one in keys_of(cls).items():
        value = getattr(table, key)
        if value is not None and value != cls.__dataclass_fields__[key].default:
            yield Entry(f"{name}.{key}", one.kind, value)
