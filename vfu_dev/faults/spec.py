"""A fault as data: an operation, one action in it, and the conditions under which it strikes.

As text, for the command line, files and people: `op=mig-write,delay=1.5,when=initial-received`. As a mapping
of the same keys, for the control socket and scenarios: `{"op": "mig-write", "delay": 1.5, ...}`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfu_dev.errors import ConfigError
from vfu_dev.sizes import parse_size
from vfu_dev.uapi import DeviceState

# The client gives up on a reply after 5 s (QEMU's x-msg-timeout), and vfu_dev.client does by default.
CLIENT_TIMEOUT_SECONDS = 5.0
MAX_DELAY_SECONDS = 3600.0

# What can go wrong in which operation; operations are the protocol's, and the device's own.
_ANY = ("error", "delay", "stall", "disconnect", "exit")
_DATA = (*_ANY, "corrupt", "short")
OPERATIONS: dict[str, tuple[str, ...]] = {
    "region-read": _DATA,
    "region-write": _DATA,
    "transition": (*_ANY, "broken"),
    "mig-read": (*_DATA, "truncate"),
    "mig-write": (*_DATA, "truncate"),
    "precopy-info": (*_ANY, "lie"),
    "data-size": (*_ANY, "lie"),
    "dma-read": _DATA,
    "dma-write": (*_DATA, "unlogged"),
    "irq": ("error", "delay", "stall", "disconnect", "exit"),
    "reset": _ANY,
}
ACTIONS = tuple(dict.fromkeys(action for actions in OPERATIONS.values() for action in actions))
# Operations that have an amount of data, which `after-bytes` counts.
DATA_OPERATIONS = tuple(name for name, actions in OPERATIONS.items() if "corrupt" in actions)

LIES = ("zero", "huge", "grow")
WHENS = ("always", "initial-received")
_OLDER_WHENS = {"initial-loaded": "initial-received"}  # as it was until JSON version 1
RANDOM = "random"
_STATES = tuple(state.name for state in DeviceState)
_MAX_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class Fault:
    """One fault. The field of its action is set, those of the other actions are None or False.

    Attributes:
        op: the operation, one of `OPERATIONS`.
        error: name of the errno that the operation fails with.
        delay: seconds that it takes longer.
        stall: it does not go on until the fault is cleared, its trigger vanishes, or the client or the server
            goes away.
        disconnect: the client's connection is closed.
        exit: status that the server ends with at once, without cleaning up.
        broken: the transition fails and the device is in ERROR.
        corrupt: byte whose lowest bit is flipped, of the migration stream or of the one access; or "random":
            any bit of each access.
        short: bytes of each access that are moved; the rest of a read is 0xff, of migration data missing,
            of a write lost.
        truncate: bytes of the migration stream after which there are no more.
        lie: a number of bytes, "zero", "huge" (2^64 - 1), or "grow": what is true and 16 MiB more each time.
        unlogged: DMA logging does not learn of the write.
        rate: share of the calls that it happens in, 0 to 1.
        seed: of the choice by `rate` and of random corruption.
        count: maximum number of hits.
        after: calls that go well before it may happen.
        after_bytes: bytes that do.
        trigger: it happens only while this file exists.
        state: it happens only in this migration state.
        bar: it happens only in accesses to this BAR (region-read, region-write).
        origin, target: it happens only on arcs from this state, to this state (transition).
        when: "initial-received": with the mig-write that completes the initial data, once it was taken.
        force: a delay that outlasts the client's patience is meant.
    """

    op: str
    error: str | None = None
    delay: float | None = None
    stall: bool = False
    disconnect: bool = False
    exit: int | None = None
    broken: bool = False
    corrupt: int | str | None = None
    short: int | None = None
    truncate: int | None = None
    lie: int | str | None = None
    unlogged: bool = False
    rate: float = 1.0
    seed: int = 0
    count: int | None = None
    after: int = 0
    after_bytes: int = 0
    trigger: Path | None = None
    state: DeviceState | None = None
    bar: int | None = None
    origin: DeviceState | None = None
    target: DeviceState | None = None
    when: str = "always"
    force: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise _wrong("op", self.op, one_of(OPERATIONS))
        actions = self.actions
        if len(actions) != 1:
            found = " and ".join(actions) or "none"
            raise ConfigError(f"fault: one action is needed, found {found}; {one_of(OPERATIONS[self.op])}")
        if actions[0] not in OPERATIONS[self.op]:
            raise _wrong(actions[0], self.op, one_of(OPERATIONS[self.op]), "for op ")
        if self.delay is not None and self.delay >= CLIENT_TIMEOUT_SECONDS and not self.force:
            raise _wrong(
                "delay",
                f"{self.delay:g}",
                f"less than {CLIENT_TIMEOUT_SECONDS:g} s, the client's patience; force=yes if that is meant",
            )
        if self.bar is not None and self.op not in ("region-read", "region-write"):
            raise _wrong("bar", self.op, "op=region-read or op=region-write", "for op ")
        if self.op != "transition" and (self.origin or self.target):
            raise _wrong("arc", self.op, "op=transition", "for op ")
        if self.when != "always" and (self.op != "mig-write" or actions[0] in _OF_CONTENT):
            raise _wrong("when", self.when, "op=mig-write with error, delay, stall, disconnect or exit")
        if self.after_bytes and self.op not in DATA_OPERATIONS:
            raise _wrong("after-bytes", self.op, one_of(DATA_OPERATIONS), "for op ")

    @property
    def actions(self) -> list[str]:
        """Names of the actions that are set; exactly one in a fault that exists."""
        values = {name: getattr(self, name) for name in ACTIONS}
        return [name for name, value in values.items() if value is not None and value is not False]

    @property
    def action(self) -> str:
        """The name of what goes wrong."""
        return self.actions[0]

    @property
    def error_number(self) -> int:
        """The errno of `error`."""
        number: int = getattr(errno, self.error or "EIO")
        return number

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fault:
        """Return the fault that a mapping describes; its values may be text.

        Raises: ConfigError: names the key and what is allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"fault {values!r}: expected a table of keys and values")
        fields: dict[str, Any] = {}
        for key, value in values.items():
            if key not in _KEYS:
                raise ConfigError(f"fault: no such key {key!r}; expected {', '.join(_KEYS)}")
            if value is None:
                continue
            fields |= _KEYS[key](key, value)
        if "op" not in fields:
            raise ConfigError(f"fault: op is missing; {one_of(OPERATIONS)}")
        return cls(**fields)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault that `key=value,key=value` describes; a flag needs no value.

        Raises: ConfigError: names the key and what is allowed.
        """
        values: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            if key in values:
                raise ConfigError(f"fault {text!r}: {key} twice")
            values[key] = value if equals else _BARE.get(key, "yes")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, without what is at its default."""
        out: dict[str, Any] = {"op": self.op}
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value == default or name in ("op", "origin", "target"):
                continue
            if isinstance(value, DeviceState):
                value = value.name
            out[name.replace("_", "-")] = str(value) if isinstance(value, Path) else value
        if self.origin and self.target:
            out["arc"] = f"{self.origin.name}->{self.target.name}"
        elif self.target:
            out["to"] = self.target.name
        return out

    def __str__(self) -> str:
        """Return what `parse` takes."""
        words = {True: "yes", False: "no"}
        return ",".join(
            f"{key}={words[value] if isinstance(value, bool) else value}"
            for key, value in self.to_dict().items()
        )


# Actions that change what is moved: they have no moment of their own.
_OF_CONTENT = ("corrupt", "short", "truncate", "lie")
_DEFAULTS = {name: one.default for name, one in Fault.__dataclass_fields__.items()}


def one_of(names: Any) -> str:
    """Return the allowed values in words."""
    return "expected one of " + ", ".join(str(name) for name in names)


def _wrong(key: str, value: object, expected: str, about: str = "") -> ConfigError:
    return ConfigError(f"fault: {key} {about}{value}: {expected}")


def _op(key: str, value: Any) -> dict[str, Any]:
    return {"op": str(value)}


def _errno(key: str, value: Any) -> dict[str, Any]:
    name = "EIO" if value is True or value in ("", "yes") else str(value).upper()
    if name not in errno.errorcode.values():
        raise _wrong(key, repr(value), "the name of an errno, such as EIO, ENOSPC, EBUSY")
    return {key: name}


def _number(low: float, high: float, unit: str) -> Callable[[str, Any], dict[str, Any]]:
    def parse(key: str, value: Any) -> dict[str, Any]:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if isinstance(value, bool) or not low <= number <= high:
            raise _wrong(key, repr(value), f"a number from {low:g} to {high:g}{unit}")
        return {key: number}

    return parse


def _rate(key: str, value: Any) -> dict[str, Any]:
    text = str(value)
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if isinstance(value, bool) or not 0 <= share <= 1:
        raise _wrong(key, repr(value), "0 to 1, or 0% to 100%")
    return {key: share}


def _whole(low: int, high: int = _MAX_U64) -> Callable[[str, Any], dict[str, Any]]:
    def parse(key: str, value: Any) -> dict[str, Any]:
        try:
            number = int(str(value), 0)
        except ValueError:
            number = low - 1
        if isinstance(value, bool) or not low <= number <= high:
            top = "" if high == _MAX_U64 else f" to {high}"
            raise _wrong(key, repr(value), f"a whole number from {low}{top}")
        return {key: number}

    return parse


def _size(key: str, value: Any) -> dict[str, Any]:
    try:
        count = parse_size(str(value))
    except ValueError:
        raise _wrong(key, repr(value), "bytes, such as 4096, 64K, 16M") from None
    return {key.replace("-", "_"): count}


def _size_or(*words: str) -> Callable[[str, Any], dict[str, Any]]:
    def parse(key: str, value: Any) -> dict[str, Any]:
        if value in words:
            return {key: value}
        try:
            return _size(key, value)
        except ConfigError:
            raise _wrong(key, repr(value), f"bytes, or {', '.join(words)}") from None

    return parse


def _flag(key: str, value: Any) -> dict[str, Any]:
    if value in (True, "yes", "on", "true"):
        return {key: True}
    if value in (False, "no", "off", "false"):
        return {}
    raise _wrong(key, repr(value), "yes or no")


def _state(field: str) -> Callable[[str, Any], dict[str, Any]]:
    def parse(key: str, value: Any) -> dict[str, Any]:
        name = str(value).strip().upper()
        if name not in _STATES:
            raise _wrong(key, repr(value), one_of(_STATES))
        return {field: DeviceState[name]}

    return parse


def _arc(key: str, value: Any) -> dict[str, Any]:
    origin, arrow, target = str(value).partition("->")
    if not arrow:
        raise _wrong(key, repr(value), "FROM->TO, such as PRE_COPY->STOP_COPY")
    return _state("origin")(key, origin) | _state("target")(key, target)


def _when(key: str, value: Any) -> dict[str, Any]:
    value = _OLDER_WHENS.get(value, value)
    if value not in WHENS:
        raise _wrong(key, repr(value), one_of(WHENS))
    return {key: value}


def _path(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, str | Path) or not str(value):
        raise _wrong(key, repr(value), "the path of a file")
    return {key: Path(value)}


_KEYS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "op": _op,
    "error": _errno,
    "delay": _number(0, MAX_DELAY_SECONDS, " seconds"),
    "stall": _flag,
    "disconnect": _flag,
    "exit": _whole(0, 255),
    "broken": _flag,
    "corrupt": _size_or(RANDOM),
    "short": _size,
    "truncate": _size,
    "lie": _size_or(*LIES),
    "unlogged": _flag,
    "rate": _rate,
    "seed": _whole(0),
    "count": _whole(0),
    "after": _whole(0),
    "after-bytes": _size,
    "trigger": _path,
    "state": _state("state"),
    "bar": _whole(0, 5),
    "arc": _arc,
    "to": _state("target"),
    "when": _when,
    "force": _flag,
}
KEYS = tuple(_KEYS)
# What a key without a value means, where that is not "yes".
_BARE = {"corrupt": RANDOM, "exit": "1", "truncate": "0", "lie": "zero"}
