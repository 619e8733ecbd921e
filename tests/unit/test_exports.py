"""The public surface that `vfu_dev.__init__` states: each export is documented, typed and named as public."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest

import vfu_dev

PUBLIC = ("vfu_dev.device", "vfu_dev.testing", "vfu_dev.client")
EXPORTS = [(name, export) for name in PUBLIC for export in importlib.import_module(name).__all__]


def functions(thing: Any) -> Iterator[tuple[str, FunctionType]]:
    """Yield a function itself; of a class the public methods that it, or a base class of ours, defines."""
    if isinstance(thing, FunctionType):
        yield thing.__name__, thing
    if not isinstance(thing, type):
        return
    for cls in thing.__mro__:
        if not cls.__module__.startswith("vfu_dev."):
            continue
        for name, member in vars(cls).items():
            inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            # A lambda is a field's default, not a method.
            if not name.startswith("_") and isinstance(inner, FunctionType) and inner.__name__ != "<lambda>":
                yield f"{cls.__name__}.{name}", inner


@pytest.mark.parametrize("name", PUBLIC)
def test_the_surface_is_stated(name: str) -> None:
    assert name in (vfu_dev.__doc__ or "")


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_private_cannot_be_imported_by_accident(name: str) -> None:
    """Besides what `__all__` names there are the package's own modules: no helper, nothing imported."""
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__, key=lambda one: (not one.isupper(), one))
    extra = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in module.__all__ and not is_own_module(value, name)
    }
    assert extra == set()


def is_own_module(value: object, package: str) -> bool:
    return isinstance(value, ModuleType) and value.__name__.startswith(f"{package}.")


@pytest.mark.parametrize(("name", "export"), EXPORTS)
def test_an_export_is_documented_typed_and_shows_its_public_path(name: str, export: str) -> None:
    thing = getattr(importlib.import_module(name), export)
    if export.isupper():
        assert isinstance(thing, int)  # a constant has neither docstring nor path
        return
    assert inspect.getdoc(thing), "no docstring"
    assert thing.__module__ == name
    for label, function in functions(thing):
        assert inspect.getdoc(function), f"{label} has no docstring"
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, f"{label} returns what?"
        for parameter in list(signature.parameters.values())[("." in label) :]:
            assert parameter.annotation is not inspect.Parameter.empty, f"{label}: {parameter.name} is what?"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_package_can_be_imported_first(name: str) -> None:
    """In a fresh process, and everything it names with `*`."""
    code = f"from {name} import *; import {name}; assert set({name}.__all__) <= set(globals())"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tests_see_functions() -> None:
    """A guard against a walk that finds nothing."""
    device = importlib.import_module("vfu_dev.device").Device
    assert {"Device.region_read", "Device.reset"} & {label for label, _ in functions(device)}
