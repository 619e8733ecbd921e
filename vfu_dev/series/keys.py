"""The keys of a scenario file: allowed values and defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS, MAX_BANDWIDTH
from vfu_dev.errors import nearest, written
from vfu_dev.lab.options import VERIFY
from vfu_dev.lab.policy import Rule, RuleError
from vfu_dev.sizes import parse_bandwidth, parse_size
from vfu_dev.toml_source import Source
from vfu_dev.vm import MAX_DEVICES

# A move on a machine with two cores takes a second or two; more than this is a mistake in the file.
MAX_MOVES = 10_000
MAX_SECONDS = 3600.0
# Divides a terabyte to a kilobyte.
MAX_SCALE = 1_000_000_000


@dataclass(frozen=True)
class Key:
    """One key: `parse` returns the meaning of a value; `allowed` describes what it takes.

    `parse` raises ValueError, or RuleError, which says more than `allowed`.
    """

    allowed: str
    parse: Callable[[Any], Any]
    default: Any = None


def _size(low: int = 1, default: Any = None, of_text: Callable[[str], int] = parse_size) -> Key:
    def parse(value: Any) -> int:
        size = of_text(value) if isinstance(value, str) else value
        if not isinstance(size, int) or isinstance(size, bool) or size < low:
            raise ValueError
        return size

    return Key(f"a size such as 4096, 64K, 16M, 1G, {low} at least", parse, default)


def _int(low: int, high: int, default: int) -> Key:
    def parse(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return Key(f"a whole number from {low} to {high}", parse, default)


def _milliseconds(high: int, default: int) -> Key:
    """Of QEMU, which takes whole ones: a fraction is rounded up."""

    def parse(value: Any) -> int:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= high:
            raise ValueError
        return math.ceil(value)

    return Key(f"milliseconds above 0, {high} at most", parse, default)


def _seconds(low: float, default: float) -> Key:
    def parse(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= MAX_SECONDS:
            raise ValueError
        return float(value)

    return Key(f"seconds from {low:g} to {MAX_SECONDS:g}", parse, default)


def _bool(default: bool) -> Key:
    def parse(value: Any) -> bool:
        if value in ("on", "off"):
            return bool(value == "on")
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Key('true or false (or "on", "off")', parse, default)


def _choice(*words: str, **aliases: str) -> Key:
    """One of `words`, of which the first is the default; `aliases` are earlier names."""

    def parse(value: Any) -> str:
        if isinstance(value, str) and value in aliases:
            return aliases[value]
        if value not in words:
            raise ValueError
        return str(value)

    return Key("one of " + ", ".join(words), parse, words[0])


def _texts(what: str) -> Key:
    def parse(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise ValueError
        return tuple(value)

    return Key(f"a list of {what}", parse, ())


def _policy() -> Key:
    texts = _texts('rules such as "passes=3,seconds=10,downtime-limit=300" (vfu-dev docs policies)')

    def parse(value: Any) -> tuple[str, ...]:
        rules: tuple[str, ...] = texts.parse(value)
        for text in rules:
            Rule.parse(text)
        return rules

    return Key(texts.allowed, parse, ())


def _class() -> Key:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or ":" not in value:
            raise ValueError
        return value

    return Key("FILE.py:CLASS or MODULE:CLASS, as `vfu-dev serve --device` takes it", parse)


def _profile() -> Key:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    return Key(
        "the name of a shipped profile or the path of a file, as `vfu-dev serve --profile` takes it", parse
    )


def _any() -> Key:
    def parse(value: Any) -> Any:
        if not isinstance(value, str | int | float):
            raise ValueError
        return value

    return Key("a number, true, false or text, as QEMU takes it", parse)


# Of each table its keys. `load`, `qemu.parameters` and `qemu.capabilities` are open: see `key_of`.
KEYS: dict[str, dict[str, Key]] = {
    "device": {
        "class": _class(),
        "memory": _size(4096, 8 << 20),
        "devices": _int(1, MAX_DEVICES, 1),
        "access": _choice("trap", "mmap"),
        "page-size": _size(4096, 4096),
        "profile": _profile(),
        "scale": _int(1, MAX_SCALE, 1),
        "serve": _texts('further arguments of `vfu-dev serve`, such as ["--initial", "1M"]'),
    },
    "faults": {
        "source": _texts("faults of the source's servers (vfu-dev docs faults)"),
        "destination": _texts("faults of the destination's servers (vfu-dev docs faults)"),
    },
    "qemu": {
        "guest": _choice("none", "linux"),
        "accel": _choice("tcg", "kvm"),
        "pre-copy": _bool(True),
        "switchover-ack": _bool(False),
        "auto-converge": _bool(False),
        "downtime-limit": _milliseconds(2_000_000, round(DOWNTIME_LIMIT_SECONDS * 1000)),
        "max-bandwidth": _size(0, MAX_BANDWIDTH, parse_bandwidth),
        # 0: QEMU measures it, which varies with the machine's load.
        "avail-switchover-bandwidth": _size(0, 0, parse_bandwidth),
        "policy": _policy(),
    },
    "run": {
        "moves": _int(1, MAX_MOVES, 70),
        "warmup": _seconds(0, 0.5),
        "settle": _seconds(0, 0.2),
        # A load with a period meets moves at every point of it, not always at the same one.
        "jitter": _seconds(0, 0.0),
        "timeout": _seconds(0.5, 60.0),
        "verify": _choice(*VERIFY, guest="auto"),
        "expect": _choice("completed", "not-converged", "either"),
    },
}
_OPEN = ("load", "qemu.parameters", "qemu.capabilities")
LOAD_PLACE = _choice("guest", "device")


def key_of(name: str) -> Key | None:
    """Return what `table.key` takes; None for a key of the load, which Workload judges as a whole.

    Raises: KeyError: there is no such key.
    """
    table, _, key = name.rpartition(".")
    if name == "load.place":
        return LOAD_PLACE
    if table == "load":
        return None
    if table == "qemu.capabilities":
        return _bool(True)
    if table in _OPEN:
        return _any()
    return KEYS[table][key]


def names() -> list[str]:
    """Return every `table.key` there is."""
    found = [f"{table}.{key}" for table, keys in KEYS.items() for key in keys]
    return [*found, "load.place"]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted names; `load.burst` stays a table, which Workload takes."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and not name.startswith("load."):
            out |= flatten(value, name)
        else:
            out[name] = value
    return out


def judge_value(source: Source, at: str, name: str, value: Any) -> Any:
    """Return what `value` of the key `name` means.

    Args: at: where it stands in the file, dotted: the name itself, or below `short`, `sweep`, `variants`.
    Raises: ConfigError: file, line, key and what is allowed.
    """
    try:
        key = key_of(name)
    except KeyError:
        near = nearest(name, names())
        hint = f"did you mean {near}?" if near else f"the keys are {', '.join(names())}, and load's"
        raise source.error(at, f"no such key; {hint}") from None
    if key is None:
        return value
    try:
        return key.parse(value)
    except RuleError as error:
        raise source.error(at, str(error), error.rule) from None
    except (ValueError, TypeError):
        raise source.error(at, f"{written(value)}: expected {key.allowed}") from None
