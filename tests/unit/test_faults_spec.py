"""What a fault is, as text and as a mapping, and which calls it strikes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vfu_dev.errors import ConfigError
from vfu_dev.faults import ACTIONS, OPERATIONS, Fault, InjectedError
from vfu_dev.faults.injected import ArmedFault
from vfu_dev.uapi import DeviceState

TEXTS = [
    "op=mig-write,delay=1.5,when=initial-received",
    "op=mig-read,error=ENOSPC,rate=0.1,seed=7,count=3,after=2",
    "op=transition,broken=yes,arc=PRE_COPY->PRE_COPY_P2P",
    "op=transition,error=EBUSY,to=STOP_COPY",
    "op=mig-read,corrupt=random,after-bytes=1048576,state=STOP_COPY",
    "op=precopy-info,lie=huge,trigger=/tmp/inject",
    "op=region-read,delay=8.0,force=yes",
    "op=reset,exit=3",
    "op=region-write,error=EIO,bar=2",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_mapping_say_the_same(text: str) -> None:
    """A fault is what its own text says, and what its mapping says."""
    fault = Fault.parse(text)
    assert str(fault) == text
    assert Fault.from_dict(fault.to_dict()) == fault


def test_every_action_of_every_operation_can_be_asked_for() -> None:
    """With the shortest text there is; what it becomes is another fault for each."""
    values = {"delay": "=1", "short": "=4"}
    faults = [
        Fault.parse(f"op={op},{action}{values.get(action, '')}")
        for op, actions in OPERATIONS.items()
        for action in actions
    ]
    assert len(set(faults)) == sum(len(actions) for actions in OPERATIONS.values())
    assert all(fault.action in ACTIONS for fault in faults)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["op is missing", "mig-read"]),
        ({"op": "mig-red", "error": "EIO"}, ["op mig-red", "mig-read"]),
        ({"op": "irq", "error": "EIO", "colour": "red"}, ["'colour'", "after-bytes"]),
        ({"op": "irq"}, ["one action", "none", "stall"]),
        ({"op": "irq", "error": "EIO", "delay": 1}, ["error and delay"]),
        ({"op": "irq", "truncate": "1M"}, ["truncate for op irq", "expected one of error, delay"]),
        ({"op": "irq", "error": "ENOTHING"}, ["error 'ENOTHING'", "EIO"]),
        ({"op": "irq", "error": "EIO", "rate": "110%"}, ["rate '110%'", "0% to 100%"]),
        ({"op": "irq", "error": "EIO", "rate": "nan"}, ["rate 'nan'"]),
        ({"op": "irq", "error": "EIO", "count": -1}, ["count -1", "whole number from 0"]),
        ({"op": "irq", "error": "EIO", "state": "RUNING"}, ["state 'RUNING'", "RUNNING"]),
        ({"op": "transition", "error": "EIO", "arc": "RUNNING"}, ["arc 'RUNNING'", "FROM->TO"]),
        ({"op": "irq", "error": "EIO", "to": "STOP"}, ["op=transition"]),
        ({"op": "irq", "error": "EIO", "bar": 2}, ["bar for op irq", "region-read"]),
        ({"op": "region-read", "error": "EIO", "bar": 6}, ["bar 6", "0 to 5"]),
        (
            {"op": "mig-read", "error": "EIO", "when": "initial-received"},
            ["when initial-received", "mig-write"],
        ),
        ({"op": "mig-write", "corrupt": "1", "when": "initial-received"}, ["when initial-received"]),
        ({"op": "irq", "delay": 5}, ["delay 5", "less than 5 s", "force=yes"]),
        ({"op": "irq", "delay": "soon"}, ["delay 'soon'", "a number from 0"]),
        ({"op": "data-size", "lie": "small"}, ["lie 'small'", "zero, huge, grow"]),
        ({"op": "irq", "error": "EIO", "after-bytes": "1M"}, ["after-bytes", "mig-read"]),
        ({"op": "irq", "stall": "perhaps"}, ["stall 'perhaps'", "yes or no"]),
    ],
)
def test_what_cannot_be_is_refused_with_key_and_allowed_values(
    values: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Fault.from_dict(values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def struck(text: str, calls: int, state: DeviceState = DeviceState.RUNNING) -> list[int]:
    """Return the numbers of the calls that a fault strikes, from 1."""
    armed = ArmedFault(1, Fault.parse(text))
    return [number for number in range(1, calls + 1) if armed.strikes(state, None, True)]


def test_count_after_and_state_choose_calls() -> None:
    assert struck("op=irq,error,count=2", 5) == [1, 2]
    assert struck("op=irq,error,after=3", 5) == [4, 5]
    assert struck("op=irq,error,after=1,count=1", 5) == [2]
    assert struck("op=irq,error,state=PRE_COPY", 3) == []
    assert struck("op=irq,error,state=PRE_COPY", 3, DeviceState.PRE_COPY) == [1, 2, 3]


def test_a_rate_is_met_and_depends_on_the_seed_alone() -> None:
    """10 % of 1000 calls are 50 to 150; the same seed strikes the same calls, another one others."""
    tenth = struck("op=irq,error,rate=10%,seed=1", 1000)
    assert 50 <= len(tenth) <= 150
    assert struck("op=irq,error,rate=0.1,seed=1", 1000) == tenth
    assert struck("op=irq,error,rate=0.1,seed=2", 1000) != tenth
    assert struck("op=irq,error,rate=0%", 1000) == []
    assert len(struck("op=irq,error,rate=100%", 1000)) == 1000


def test_a_trigger_file_arms_while_it_exists(tmp_path: Path) -> None:
    """Works, fails as asked, works again."""
    file = tmp_path / "inject"
    armed = ArmedFault(1, Fault.parse(f"op=irq,error,trigger={file}"))
    assert not armed.strikes(DeviceState.RUNNING, None, True)
    file.touch()
    assert armed.strikes(DeviceState.RUNNING, None, True)
    file.unlink()
    assert not armed.strikes(DeviceState.RUNNING, None, True)
    assert (armed.calls, armed.hits) == (3, 1)


def test_an_injected_error_carries_the_errno_asked_for() -> None:
    fault = Fault.parse("op=irq,error=enospc")
    error = ArmedFault(1, fault).error()
    assert isinstance(error, InjectedError)
    assert (error.errno, str(fault) in str(error)) == (28, True)
