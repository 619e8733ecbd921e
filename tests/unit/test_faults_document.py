"""docs/faults.md names every operation, action and key, and every fault in it is one."""

from __future__ import annotations

import re
from pathlib import Path

from vfu_dev.faults import ACTIONS, OPERATIONS, Fault
from vfu_dev.faults.spec import KEYS

TEXT = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()


def test_every_fault_of_the_page_is_one() -> None:
    """Whatever begins with `op=` is taken as it stands."""
    found = re.findall(r"op=[\w,=.%>-]+", TEXT)
    assert len(found) >= 5
    for text in found:
        Fault.parse(text)


def test_the_page_names_everything_there_is() -> None:
    """Operations with the actions that not all have; actions; keys."""
    common = set.intersection(*(set(actions) for actions in OPERATIONS.values()))
    assert common == {"error", "delay", "stall", "disconnect", "exit"}
    told: dict[str, set[str]] = {}
    for row in TEXT.partition("## Operations")[2].partition("## Actions")[0].splitlines():
        if row.startswith("| `") and not row.startswith("| `op`"):
            names, actions = row.split("|")[1], row.split("|")[3]
            for name in re.findall(r"`([\w-]+)`", names):
                told[name] = set(re.findall(r"`(\w+)`", actions))
    assert {name: found - common for name, found in told.items()} == {
        operation: set(actions) - common for operation, actions in OPERATIONS.items()
    }
    for name in (*ACTIONS, *KEYS):
        assert re.search(rf"`{name}\b", TEXT), name
