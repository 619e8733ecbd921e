"""Loads the device class that a command line names by `MODULE:CLASS` or `FILE.py:CLASS`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import vfu_dev
from vfu_dev.device.bar import Bar
from vfu_dev.device.base import Device
from vfu_dev.errors import ConfigError

T = TypeVar("T")
D = TypeVar("D", bound=Device)
# Gets a device of which nothing was made yet, and what it declares; returns what it is to have.
Settle = Callable[[Device, dict[str, Bar]], dict[str, Bar]]

_PACKAGE = Path(vfu_dev.__file__).parent


def find_class(spec: str) -> type[Device]:
    """Import the class that `spec` names: MODULE:CLASS, or FILE.py:CLASS.

    Modules are looked for in the working directory too.

    Raises: ConfigError: there is none, or importing it failed; the text has the file and line.
    """
    module_name, colon, class_name = spec.rpartition(":")
    if not colon or not module_name or not class_name.isidentifier():
        raise ConfigError(f"device {spec!r}: expected MODULE:CLASS or FILE.py:CLASS")
    module = _guarded(f"device {spec!r}", lambda: _import(module_name))
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, Device):
        return found
    there = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Device) and value is not Device
    ]
    wrong = "does not exist" if found is None else "is not a Device"
    text = f"{class_name} {wrong} in {module_name}; devices there: {', '.join(there) or 'none'}"
    raise ConfigError(f"device {spec!r}: {text}")


def _import(name: str) -> types.ModuleType:
    if not name.endswith(".py"):
        working_directory = str(Path.cwd())
        if working_directory not in sys.path:
            sys.path.insert(0, working_directory)
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # something that it imports
            raise ConfigError(
                f"there is no module {error.name}, neither in {working_directory} nor where Python looks "
                "(PYTHONPATH); a class in a file is FILE.py:CLASS"
            ) from error
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Beside the file lies what it imports, as when Python runs it.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _guarded(what: str, work: Callable[[], T]) -> T:
    """Return what `work` returns; an author's error becomes one line with the place it came from.

    So does SystemExit: a file that is a program, without `if __name__ == "__main__"`, ends here.
    """
    try:
        return work()
    except ConfigError as err:
        raise ConfigError(f"{what}: {err}") from err
    except (Exception, SystemExit) as err:
        frames = traceback.extract_tb(err.__traceback__)
        # The author's line rather than the one of this package that refused what it asked for.
        own = [
            frame
            for frame in frames
            if not frame.filename.startswith("<frozen")  # parts of the import system
            and frame.filename != importlib.__file__
            and not Path(frame.filename).is_relative_to(_PACKAGE)
        ]
        place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
        if isinstance(err, SyntaxError) and err.filename:
            place = f"{err.filename}:{err.lineno}: "
        raise ConfigError(f"{what}: {place}{type(err).__name__}: {err}") from err


def settled(cls: type[D], settle: Settle) -> type[D]:
    """Return `cls` adapted by its server: a subclass, as its author could write one.

    Args: settle: has the last word before a device is made: on declarations, `identity` and the like.
    """

    def declarations(device: Any) -> dict[str, Bar]:
        return settle(device, cls.declarations(device))

    own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "declarations": declarations}
    return cast(type[D], types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(own)))


def make_device(cls: type[Device], name: str, options: Mapping[str, Any], given: Mapping[str, str]) -> Device:
    """Return a `cls` made with those of `options` that it has a keyword for.

    Args:
        options: keyword -> value.
        given: keyword -> how the user calls it, of options that somebody set.

    Raises: ConfigError: an option was set that the class does not take, or it refuses a value.
    """
    takes = keywords(cls)
    untaken = [given[keyword] for keyword in given if keyword not in takes]
    if untaken:
        raise ConfigError(f"{', '.join(untaken)}: {cls.__name__} decides this itself")
    arguments = {keyword: value for keyword, value in options.items() if keyword in takes}
    if "name" in takes:
        arguments["name"] = name
    device = _guarded(f"device {cls.__name__}", lambda: cls(**arguments))
    if not hasattr(device, "migration"):
        raise ConfigError(
            f"device {cls.__name__}: its __init__ has to call super().__init__(), which makes it"
        )
    device.name = name
    return device


def keywords(cls: type[Device]) -> set[str]:
    """Return the keywords that making a `cls` takes."""
    parameters = inspect.signature(cls).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = {name for name, one in parameters.items() if one.kind not in variable}
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        found |= set(inspect.signature(Device).parameters)
    return found
