"""`--config FILE.toml` and `--print-config`, for any command: its options are the keys.

The command's click options are the one place of names, defaults, help and allowed values. A file gives them
other defaults (click's `default_map`), so the command line overrides the file and the file the defaults.
"""

from __future__ import annotations

import json
import os
import re
import stat
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from vfu_dev.errors import ConfigError, nearest, written
from vfu_dev.toml_source import parse_toml

F = TypeVar("F", bound=Callable[..., Any])

# Where the values of a file came from: option name -> "FILE:LINE: key = value".
_ORIGINS = "vfu_dev.config.origins"
# Far more than all options need; what has no end, such as /dev/zero, is not read for ever.
MAX_FILE_BYTES = 1 << 20
_NOT_KEYS = ("config", "print_config", "help")


def config_options(command: F) -> F:
    """Add --config and --print-config; a command that has them calls `print_config` when asked to."""
    command = click.option(
        "--print-config",
        "print_config",
        is_flag=True,
        help="Print all of this as a file for --config, and end.",
    )(command)
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_load,
        metavar="FILE.toml",
        help="Take options from this file; the command line overrides it.",
    )(command)


def _options(command: click.Command) -> dict[str, click.Option]:
    """Return key -> option, of all that a file may set."""
    return {
        key_of(param): param
        for param in command.params
        if isinstance(param, click.Option) and param.name not in _NOT_KEYS and not param.hidden
    }


def key_of(option: click.Option) -> str:
    """Return an option's key: its name on the command line, without the hyphens before it."""
    return max(option.opts, key=len).lstrip("-")


def _load(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Make the file's values the context's defaults.

    Raises: ConfigError: file, line and key, with the allowed values.
    """
    if path is None:
        return
    content = _text_of(path)
    table = parse_toml(str(path), content)
    known = _options(ctx.command)
    defaults: dict[str, Any] = {}
    origins = ctx.meta.setdefault(_ORIGINS, {})
    for key, value in table.items():
        where = f"{path}:{_line_of(content, key)}: {key}"
        if key not in known:
            raise ConfigError(f"{where}: no such key{_hint(key, list(known))}")
        option = known[key]
        where += f" = {written(value)}"
        assert option.name is not None
        defaults[option.name] = _judged(ctx, option, value, where)
        origins[option.name] = where
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _text_of(path: Path) -> str:
    """Return a file's text, without the byte order mark that editors on Windows put first."""
    try:
        # Opening a FIFO waits for a writer, unless it is told not to.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            # A shell's <(COMMAND) and standard input are pipes too, but have their writer.
            given = str(path).startswith(("/dev/fd/", "/dev/stdin"))
            if not given and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: is not a file")
            os.set_blocking(file.fileno(), True)
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: has more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: is not UTF-8 text") from err


def _judged(ctx: click.Context, option: click.Option, value: Any, where: str) -> Any:
    """Return `value` as the text that the command line would have; the option itself says if it is one."""
    several = option.multiple and isinstance(value, list)
    try:
        parts = [_word(one) for one in (value if several else [value])]
        text = parts if option.multiple else parts[0]
        converted = option.type_cast_value(ctx, text)
        if option.callback is not None:
            option.callback(ctx, option, converted)
    except click.BadParameter as err:
        raise ConfigError(f"{where}: expected {allowed_values(option)}") from err
    except (ConfigError, TypeError) as err:
        raise ConfigError(f"{where}: expected {allowed_values(option)} ({err})") from err
    return text


def _word(value: Any) -> str:
    """Return a value of the file as a word of a command line. Raises: TypeError: there is no such word."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value == "":
        raise TypeError("this is empty")
    if isinstance(value, str) and "\0" in value:
        raise TypeError("this has a NUL character")
    if isinstance(value, (str, int)):
        try:
            return str(value)
        except ValueError:  # more digits than Python prints
            raise TypeError("this is huge") from None
    raise TypeError(f"this is {_KINDS.get(type(value), 'a date or time')}")


# What else TOML has, in words.
_KINDS = {list: "a list", dict: "a table", float: "a number with a fraction"}


def allowed_values(option: click.Option) -> str:
    """Return in words what `option` takes."""
    kind = option.type
    if allowed := getattr(kind, "allowed", ""):  # a type of vfu_dev.cli.params
        return str(allowed)
    if isinstance(kind, click.Choice):
        return "one of " + ", ".join(str(word) for word in kind.choices)
    if isinstance(kind, click.IntRange):
        return f"a number from {kind.min} to {kind.max}"
    if isinstance(kind, click.Path):
        return "a path"
    return option.metavar or "text"


def _hint(key: str, known: list[str]) -> str:
    near = nearest(key.replace("_", "-"), known)
    return f"; did you mean {near}?" if near else f"; the keys are: {', '.join(known)}"


def _line_of(content: str, key: str) -> int:
    """Return the number of the line that sets `key`: bare, quoted, or as the name of a table."""
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    lines = content.splitlines()
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 1)


def given(ctx: click.Context) -> dict[str, Any]:
    """Return name -> value of the options that the command line or a file set."""
    default = (ParameterSource.DEFAULT, None)
    return {
        name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) not in default
    }


def origin(ctx: click.Context, name: str) -> str:
    """Return where the value of option `name` was set, for an error message."""
    if ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP:
        return str(ctx.meta.get(_ORIGINS, {}).get(name, name))
    option = next(param for param in ctx.command.params if param.name == name)
    return max(option.opts, key=len)


def as_toml(ctx: click.Context, decided: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """Return the effective options of `ctx` as a file that --config takes back.

    Args: decided: name -> what becomes of an option that nobody set. An option without value, here and
          there, is a comment.
        without: names of options that do not apply and would be refused; comments too.
    """
    lines: list[str] = []
    for key, option in _options(ctx.command).items():
        assert option.name is not None
        value = ctx.params.get(option.name)
        if value is None or value == ():
            value = decided.get(option.name)
        about = f"{option.help} Expected: {allowed_values(option)}."
        lines += textwrap.wrap(about, 100, initial_indent="# ", subsequent_indent="# ")
        if option.name in without:
            lines += [f"# {key} does not apply", ""]
        elif value is None or value == ():
            why = f": {option.show_default}" if isinstance(option.show_default, str) else ""
            lines += [f"# {key} is not set{why}", ""]
        else:
            lines += [f"{key} = {_toml(option, value)}", ""]
    return "\n".join(lines)


def _toml(option: click.Option, value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(option, one) for one in value) + "]"
    shown = getattr(option.type, "shown", None)  # a type of vfu_dev.cli.params
    if shown is not None:
        value = shown(value)
    if isinstance(value, int):
        base = getattr(option.type, "base", 10)
        return f"{value:#06x}" if base == 16 else str(value)
    # A JSON string is a TOML basic string (TOML 1.0.0, "String").
    return json.dumps(str(value), ensure_ascii=False)


@contextmanager
def blaming(ctx: click.Context, names: Iterable[str], besides: Collection[str] = ()) -> Iterator[None]:
    """Have a ConfigError say which lines of a file it may come from: of options `names`, set by a file.

    Where the error itself names keys, of options that a file set or of those in `besides`, these alone.
    """
    try:
        yield
    except ConfigError as err:
        text = str(err)
        keys = {key_of(option): option.name for option in _options(ctx.command).values()}
        found = ctx.meta.get(_ORIGINS, {})
        named = [
            name
            for key, name in keys.items()
            if re.search(rf"{key}\b", text) and (name in found or name in besides)
        ]
        lines = [found[name] for name in (named or names) if name in found]
        if not lines:
            raise
        raise ConfigError(f"{text} ({'; '.join(lines)})") from err
