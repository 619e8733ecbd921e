"""A scenario: devices, load, QEMU's settings and what is varied, from a TOML file to points to be measured.

docs/series.md is the format's definition. A point is one combination of a variant and the values of all
sweeps: one running VM, moved back and forth.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vfu_dev.errors import ConfigError
from vfu_dev.faults.spec import Fault
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.profile.shipped import serve_arguments
from vfu_dev.series.checks import Check, parse_check
from vfu_dev.series.keys import KEYS, LOAD_PLACE, flatten, judge_value
from vfu_dev.toml_source import Source, parse_toml
from vfu_dev.vm.own_device import SERVE_OPTIONS, OwnDevice, ask_own_device
from vfu_dev.workload import Workload
from vfu_dev.workload.spec import RATE_KEYS, WRITE_SIZE_KEYS

# The shipped scenarios are files of the package.
SHIPPED = Path(__file__).resolve().parents[1] / "scenarios"
# Number of moves that such figures need (docs/series.md): 70 to 100 moves of one running VM.
METHOD_MOVES = 70
SHORT_MOVES = 3
SHORT_WARMUP_SECONDS = 0.2
MAX_POINTS = 10_000
TABLES = ("device", "faults", "load", "qemu", "run")
TOP = ("title", "about", *TABLES, "short", "sweep", "variants", "check")


@dataclass(frozen=True)
class Point:
    """One VM to move back and forth.

    Attributes:
        name: of its files; made of variant and sweep values.
        variant: None where the scenario has none.
        sweep: key -> value as written in the file.
        settings: every `table.key` with its parsed value (sizes in bytes), except the load's.
        own_device: what `serve` says of `device.class`.
    """

    name: str
    variant: str | None
    sweep: Mapping[str, Any]
    settings: Mapping[str, Any]
    load: Workload
    own_device: OwnDevice | None = None

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def options(self, qemu: Path, library: Path | None, guest: Path | None) -> MigrateOptions:
        """Return the lab's options for this point; `guest`: the image for points with a Linux guest."""
        more = {
            table: tuple(
                (name.removeprefix(f"{table}."), value)
                for name, value in self.settings.items()
                if name.startswith(f"{table}.")
            )
            for table in ("qemu.parameters", "qemu.capabilities")
        }
        profile = self["device.profile"]
        replay = () if profile is None else serve_arguments(profile, self["device.scale"])
        capabilities = more["qemu.capabilities"]
        if self["qemu.auto-converge"]:
            capabilities += (("auto-converge", True),)
        return MigrateOptions(
            qemu=qemu,
            library=library,
            guest_image=guest if self["qemu.guest"] == "linux" else None,
            own_device=self.own_device,
            memory_bytes=self["device.memory"],
            page_size=self["device.page-size"],
            access=self["device.access"],
            devices=self["device.devices"],
            load=self.load,
            load_place=self["load.place"],
            verify=self["run.verify"],
            pre_copy=self["qemu.pre-copy"],
            switchover_ack=self["qemu.switchover-ack"],
            downtime_limit_ms=self["qemu.downtime-limit"],
            max_bandwidth=self["qemu.max-bandwidth"],
            switchover_bandwidth=self["qemu.avail-switchover-bandwidth"],
            policy=self["qemu.policy"],
            parameters=more["qemu.parameters"],
            capabilities=capabilities,
            accel=self["qemu.accel"],
            warmup_seconds=self["run.warmup"],
            settle_seconds=self["run.settle"],
            timeout_seconds=self["run.timeout"],
            server_extra=(*replay, *self["device.serve"]),
            replays=profile is not None,
            faults_source=self["faults.source"],
            faults_destination=self["faults.destination"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it for a summary."""
        return {
            "name": self.name,
            "variant": self.variant,
            "sweep": dict(self.sweep),
            "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in self.settings.items()},
            "load": self.load.to_dict(),
        }


@dataclass(frozen=True)
class Scenario:
    """A scenario file, checked. `text` is the unchanged file."""

    name: str
    title: str
    about: str
    text: str
    points: tuple[Point, ...]
    short_points: tuple[Point, ...]
    checks: tuple[Check, ...] = ()
    variants: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)

    def chosen(self, short: bool) -> tuple[Point, ...]:
        """Return the points of the full or the short form."""
        return self.short_points if short else self.points


@dataclass
class _Parts:
    base: dict[str, Any]
    short: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    sweep: dict[str, list[Any]]
    short_sweep: dict[str, list[Any]]
    short_variants: list[str] | None
    changes: Mapping[str, Any]


def parse(
    text: str, name: str, source_name: str | None = None, changes: Mapping[str, Any] | None = None
) -> Scenario:
    """Return the scenario that `text` describes.

    Args: name: of the scenario. source_name: what errors call the file.
          changes: `table.key` -> value, over whatever the file says.
    Raises: ConfigError: file, line, key and what is allowed there.
    """
    source = Source(source_name or name, text)
    raw = parse_toml(source.name, text)
    for key in raw:
        if key not in TOP:
            raise source.error(key, f"no such table or key; there are {', '.join(TOP)}")
    for key in ("title", "about"):
        if not isinstance(raw.get(key, ""), str):
            raise source.error(key, "expected text")
    for key in (*TABLES, "short", "sweep", "variants"):
        if not isinstance(raw.get(key, {}), dict):
            raise source.error(key, f"expected a table: [{key}]")
    parts = _parts(source, raw, changes or {})
    variants = tuple(parts.variants)
    points = tuple(_points(source, parts, short=False))
    short_points = tuple(_points(source, parts, short=True))
    return Scenario(
        name=name,
        title=raw.get("title", name),
        about=raw.get("about", "").strip(),
        text=text,
        points=points,
        short_points=short_points,
        checks=tuple(parse_check(source, entry, variants) for entry in raw.get("check", [])),
        variants=variants,
        sweep=tuple(parts.sweep),
        changes=dict(changes or {}),
    )


def read_scenario(name: str | Path, changes: Mapping[str, Any] | None = None) -> Scenario:
    """Return the scenario in a file, or the shipped one of that name; `changes` as in `parse`.

    Raises: ConfigError: neither exists, or it says something impossible.
    """
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        path = SHIPPED / f"{name}.toml"
        if not path.exists():
            raise ConfigError(
                f"no file and no shipped scenario {str(name)!r}; there are {', '.join(shipped())}"
            )
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    return parse(text, path.stem, str(path), changes)


def shipped() -> list[str]:
    """Return the names of the shipped scenarios."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def _parts(source: Source, raw: Mapping[str, Any], changes: Mapping[str, Any]) -> _Parts:
    base = flatten({table: raw[table] for table in TABLES if table in raw})
    short = dict(raw.get("short", {}))
    short_sweep, short_variants = short.pop("sweep", {}), short.pop("variants", None)
    variants = {}
    for variant, table in raw.get("variants", {}).items():
        if not isinstance(table, dict) or not re.fullmatch(r"[\w.-]+", variant):
            raise source.error(
                f"variants.{variant}", "expected a table whose name has letters, digits, . _ -"
            )
        variants[variant] = flatten(table)
    parts = _Parts(base, flatten(short), variants, raw.get("sweep", {}), short_sweep, short_variants, changes)
    for sweep, at in ((parts.sweep, "sweep"), (parts.short_sweep, "short.sweep")):
        for key, values in sweep.items():
            if not isinstance(values, list) or not values:
                raise source.error(f"{at}.{key}", f'expected "{key}" = [a list of values]')
            for value in values:
                judge_value(source, f"{at}.{key}", key, value)
    chosen = variants if short_variants is None else short_variants
    if not isinstance(chosen, list | dict) or not set(chosen) <= set(variants):
        raise source.error("short.variants", f"expected a list of variants: {', '.join(variants)}")
    for key, value in changes.items():
        judge_value(Source("--set", ""), key, key, value)
    tables = {"": base, "short.": parts.short, **{f"variants.{name}.": v for name, v in variants.items()}}
    for at, table in tables.items():
        for key, value in table.items():
            judge_value(source, at + key, key, value)
    return parts


def _points(source: Source, parts: _Parts, short: bool) -> Iterator[Point]:
    defaults = {"load.place": LOAD_PLACE.default}
    for table, keys in KEYS.items():
        defaults |= {f"{table}.{key}": entry.default for key, entry in keys.items()}
    if short:
        # A file's own number is of the full form.
        defaults["run.warmup"] = SHORT_WARMUP_SECONDS
        defaults["run.moves"] = min(SHORT_MOVES, parts.base.get("run.moves", SHORT_MOVES))
        base = _without(parts.base, "run.moves") | parts.short
        sweep = parts.sweep | parts.short_sweep
    else:
        base, sweep = parts.base, parts.sweep
    count = max(1, len(parts.variants))
    for values in sweep.values():
        count *= len(values)
    if count > MAX_POINTS:
        raise source.error("sweep", f"{count} points, at most {MAX_POINTS}")
    names: set[str] = set()
    variants: list[str | None] = [*parts.variants] or [None]
    if short and parts.short_variants is not None:
        variants = [*parts.short_variants]
    for combination in itertools.product(*sweep.values()):
        swept = dict(zip(sweep, combination, strict=True))
        for variant in variants:
            words = [variant or "", *(f"{key.rpartition('.')[2]}={value}" for key, value in swept.items())]
            layers: dict[str, Mapping[str, Any]] = {
                "": base,
                f"variants.{variant}.": parts.variants.get(variant or "", {}),
                "sweep.": swept,
            }
            if short:
                # Variants say what differs; how often the short form moves is the short form's.
                layers[f"variants.{variant}."] = _without(layers[f"variants.{variant}."], "run.moves")
            layers["--set "] = parts.changes
            name = "_".join(word for word in words if word)
            point = _point(source, re.sub(r"[^\w.=-]+", "-", name) or "all", variant, swept, defaults, layers)
            while point.name in names:  # two values that are written alike in a file's name
                point = replace(point, name=point.name + "_")
            names.add(point.name)
            yield point


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def _point(
    source: Source,
    name: str,
    variant: str | None,
    swept: Mapping[str, Any],
    defaults: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Any]],
) -> Point:
    """Return a point; each layer's keys replace those of the layers before it."""
    settings, load = dict(defaults), dict[str, Any]()
    for at, values in layers.items():
        for key, value in values.items():
            if key.startswith("load.") and key != "load.place":
                field_name = key.removeprefix("load.").replace("-", "_")
                # Of several keys that say the same the later wins.
                for same in (RATE_KEYS, WRITE_SIZE_KEYS):
                    if field_name in same:
                        load = {k: v for k, v in load.items() if k not in same}
                load[field_name] = value
            else:
                settings[key] = judge_value(source, at + key, key, value)
    if not load or load.get("pattern") == "idle":
        load = {"pattern": "idle"}  # the rate of what it replaces goes with it
    try:
        spec = Workload.from_dict(load)
    except ConfigError as error:
        raise source.error("load", str(error)) from error
    own = _own_device(source, settings, {key for values in layers.values() for key in values})
    point = Point(name, variant, swept, settings, spec, own)
    _agree(source, point)
    return point


def _own_device(source: Source, settings: dict[str, Any], said: Collection[str]) -> OwnDevice | None:
    """Return the class of `device.class`, asked whether it takes what is `said`; the load is its own then."""
    spec = settings["device.class"]
    if spec is None:
        return None
    if "load.place" not in said:
        settings["load.place"] = "device"
    if settings["load.place"] != "device":
        raise source.error("load.place", "a guest knows only the reference device: expected device")
    given = [f"--{option}={settings[key]}" for option in SERVE_OPTIONS if (key := f"device.{option}") in said]
    try:
        return ask_own_device(spec, tuple(given))
    except ConfigError as error:
        raise source.error("device.class", str(error)) from error


def _agree(source: Source, point: Point) -> None:
    """Refuse settings that contradict each other."""
    if point["device.memory"] % point["device.page-size"]:
        raise source.error("device.memory", f"not a multiple of the page size, {point['device.page-size']}")
    if point["load.place"] == "device" and point["run.verify"] in ("dma", "mmio"):
        raise source.error(
            "run.verify", 'there is no journal of what the device wrote: run.verify = "digests"'
        )
    if any(word.partition("=")[0] == "--device" for word in point["device.serve"]):
        raise source.error("device.serve", 'a class of your own is device.class = "FILE.py:CLASS"')
    for word in point["device.serve"]:
        if (option := word.partition("=")[0]) in ("--profile", "--scale"):
            text = f"a replayed profile has keys of its own: device.{option[2:]}"
            raise source.error("device.serve", text)
    if point["device.profile"] is None and point["device.scale"] != 1:
        raise source.error("device.scale", "divides what a device.profile says: give one")
    for side in ("source", "destination"):
        for text in point[f"faults.{side}"]:
            try:
                Fault.parse(text)
            except ConfigError as error:
                raise source.error(f"faults.{side}", str(error)) from error
    writer = point["qemu.guest"] == "none" and point["load.place"] == "guest" and not point.load.is_idle
    if writer and point["device.access"] == "mmap":
        # Nothing stops the lab's writes in place of a guest: QEMU has no CPU to halt, and there is no trap to
        # refuse.
        text = 'with mmap a load needs qemu.guest = "linux" or load.place = "device"'
        raise source.error("device.access", text)
    if point["qemu.accel"] == "kvm" and point["qemu.guest"] == "none":
        raise source.error("qemu.accel", 'kvm needs qemu.guest = "linux"')
