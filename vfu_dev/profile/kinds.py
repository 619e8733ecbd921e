"""The kinds of values in a profile's file: what each may be, and how it is written."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from vfu_dev.profile.values import Curve, Distribution
from vfu_dev.sizes import parse_size

MAX_BYTES = (1 << 64) - 1  # a device may say anything that its field can hold
MAX_SECONDS = 1e7
MAX_RATE = float(1 << 50)
MAX_COUNT = (1 << 31) - 1
MAX_POINTS = 10_000
MAX_TEXT = 4000


class Kind:
    """One kind of value.

    Attributes:
        name: in a few words, for the table of keys.
        allowed: what a file may say, in words.
        ordered: whether it can be bounded.
    """

    name = ""
    allowed = ""
    ordered = False

    def parse(self, value: Any) -> Any:
        """Return what `value` of a file means. Raises: ValueError: it is not of this kind."""
        raise NotImplementedError

    def text(self, value: Any) -> str:
        """Return the TOML for a value."""
        raise NotImplementedError


class Flag(Kind):
    """True or false."""

    name = "true or false"
    allowed = name

    def parse(self, value: Any) -> bool:
        """See `Kind`."""
        if not isinstance(value, bool):
            raise ValueError
        return value

    def text(self, value: Any) -> str:
        """See `Kind`."""
        return "true" if value else "false"


class Number(Kind):
    """A number from 0; a whole one, or with a fraction."""

    ordered = True

    def __init__(self, highest: float, what: str, *, whole: bool, hint: str = "") -> None:
        self.highest = highest
        self.whole = whole
        self.name = what
        self.allowed = f"{what} from 0 to {highest:g}{hint}"

    def parse(self, value: Any) -> Any:
        """See `Kind`; whole numbers may be sizes such as "16M"."""
        if self.whole and isinstance(value, str):
            value = parse_size(value)
        wanted = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not 0 <= value <= self.highest:
            raise ValueError  # NaN is not in the range either
        return value if self.whole else float(value)

    def text(self, value: Any) -> str:
        """See `Kind`: as short as it can be read back exactly."""
        if float(value).is_integer() and abs(value) < 1e15:
            return str(int(value)) if self.whole else f"{value:.1f}"
        return str(value) if self.whole else repr(float(value))


class Words(Kind):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.allowed = "one of " + ", ".join(words)
        self.name = ", ".join(f"`{word}`" for word in words)

    def parse(self, value: Any) -> str:
        """See `Kind`."""
        if value not in self.words:
            raise ValueError
        return str(value)

    def text(self, value: Any) -> str:
        """See `Kind`."""
        return json.dumps(value)


class Text(Kind):
    """Words for people."""

    name = "text"
    allowed = f"text of at most {MAX_TEXT} characters"

    def parse(self, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise ValueError
        return value

    def text(self, value: Any) -> str:
        """See `Kind`; a JSON string is a TOML basic string, DEL apart (TOML 1.0.0, "String")."""
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


class WordList(Kind):
    """Some of some words."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.allowed = "a list of some of " + ", ".join(words)
        self.name = "list"

    def parse(self, value: Any) -> tuple[str, ...]:
        """See `Kind`."""
        if not isinstance(value, list) or not all(word in self.words for word in value):
            raise ValueError
        return tuple(value)

    def text(self, value: Any) -> str:
        """See `Kind`."""
        return json.dumps(list(value))


class Spread(Kind):
    """A distribution: a number, or [value, how often] pairs."""

    ordered = True

    def __init__(self, each: Number) -> None:
        self.each = each
        self.name = f"spread of {each.name}"
        self.allowed = f"{each.allowed}, or a list of [value, how often], values ascending"

    def parse(self, value: Any) -> Distribution:
        """See `Kind`."""
        if not isinstance(value, list):
            return Distribution.always(self.each.parse(value))
        if not 0 < len(value) <= MAX_POINTS:
            raise ValueError
        points = []
        for each, count in value:
            if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 1 << 53:
                raise ValueError
            points.append((self.each.parse(each), count))
            if len(points) > 1 and points[-1][0] <= points[-2][0]:
                raise ValueError
        return Distribution(tuple(points))

    def text(self, value: Distribution) -> str:
        """See `Kind`."""
        if len(value.points) == 1 and value.points[0][1] == 1:
            return self.each.text(value.points[0][0])
        return f"[{', '.join(f'[{self.each.text(each)}, {count}]' for each, count in value.points)}]"


class CurveKind(Kind):
    """[seconds, number] pairs in the order of time."""

    def __init__(self, each: Number) -> None:
        self.each = each
        self.name = f"curve of {each.name}"
        self.allowed = f"a list of [seconds, {each.name}], {MAX_POINTS} at most, seconds not falling"

    def parse(self, value: Any) -> Curve:
        """See `Kind`."""
        if not isinstance(value, list) or not 0 < len(value) <= MAX_POINTS:
            raise ValueError
        points = [(SECONDS.parse(at), self.each.parse(each)) for at, each in value]
        if any(after[0] < before[0] for before, after in itertools.pairwise(points)):
            raise ValueError
        return tuple(points)

    def text(self, value: Curve) -> str:
        """See `Kind`."""
        return f"[{', '.join(f'[{SECONDS.text(at)}, {self.each.text(each)}]' for at, each in value)}]"


FLAG = Flag()
BYTES = Number(MAX_BYTES, "bytes", whole=True, hint=', or a size such as "64K", "16M"')
COUNT = Number(MAX_COUNT, "a whole number", whole=True)
SECONDS = Number(MAX_SECONDS, "seconds", whole=False)
MILLISECONDS = Number(MAX_SECONDS * 1000, "a number", whole=False)
RATE = Number(MAX_RATE, "a number", whole=False)
BANDWIDTH = Number(MAX_BYTES, "bytes", whole=True, hint=', or a size such as "64K", "16M"')
PART = Number(1.0, "a part", whole=False)
BYTES_SPREAD = Spread(BYTES)
SECONDS_SPREAD = Spread(SECONDS)
BYTES_CURVE = CurveKind(BYTES)
RATE_CURVE = CurveKind(RATE)
TEXT = Text()


@dataclass(frozen=True)
class Key:
    """A key of the file.

    Attributes:
        about: for docs/profiles.md.
        marked: whether its value says where it is from.
    """

    kind: Kind
    about: str
    marked: bool


def marked(kind: Kind, about: str) -> Key:
    """Return the key of a value that has a mark."""
    return Key(kind, about, marked=True)


def plain(kind: Kind, about: str) -> Key:
    """Return the key of a value without one."""
    return Key(kind, about, marked=False)


@functools.cache
def keys_of(cls: Any) -> Mapping[str, Key]:
    """Return the keys of one of the classes of `model`, in order; tables within it are not among them."""
    found = get_type_hints(cls, include_extras=True).items()
    return {
        name: key for name, hint in found for key in getattr(hint, "__metadata__", ()) if isinstance(key, Key)
    }
