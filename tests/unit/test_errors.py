"""The tree of errors is the one that is drawn, and what a peer can cause is told from a defect."""

from __future__ import annotations

import inspect
import re

import pytest

from vfu_dev import errors
from vfu_dev.device.region import OutsideRegionError
from vfu_dev.errors import REFUSALS, ConfigError, VfuDevError, judge_name
from vfu_dev.libvfio_user.dma import GuestMemoryError


def drawn() -> dict[str, tuple[str, ...]]:
    """Return class -> its bases, as the drawing in the module's docstring has them."""
    assert errors.__doc__ is not None
    lines = re.findall(r"^ {5}[├└]── (\w+)(?: \((\w+)\))? ", errors.__doc__, re.MULTILINE)
    return {name: ("VfuDevError", *filter(None, [base])) for name, base in lines}


def test_the_drawing_is_the_tree() -> None:
    classes = {
        name: tuple(base.__name__ for base in value.__bases__)
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert classes.pop("VfuDevError") == ("Exception",)
    assert len(classes) >= 8
    assert drawn() == classes


def test_a_defect_is_no_refusal() -> None:
    assert issubclass(GuestMemoryError, REFUSALS)
    assert issubclass(OutsideRegionError, (VfuDevError, IndexError))
    for defect in (ConfigError, OutsideRegionError, errors.LibraryError, errors.ProtocolError):
        assert not issubclass(defect, REFUSALS)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "a\x7f", "a\x9bb", "a\u2028b", "a\0"])
def test_a_name_that_would_garble_a_log_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device: ") as caught:
        judge_name("device", name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["vfu-dev", "Gerät 1", "デバイス", "a b"])
def test_names_need_not_be_ascii(name: str) -> None:
    judge_name("device", name)
