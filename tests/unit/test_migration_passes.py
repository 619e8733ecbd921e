"""What a saving session tells about each of its passes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from migrationkit import PAGE, filled

from vfu_dev.migration import save
from vfu_dev.migration.schema import MigratableState
from vfu_dev.migration.stream import prelude_bytes, tail_bytes
from vfu_dev.uapi import DeviceState as S

pytestmark = pytest.mark.usefixtures("small_records")


def told(status: dict[str, object] | None) -> list[dict[str, Any]]:
    """Return the list of passes, as the control socket would send it."""
    assert status is not None
    passes: list[dict[str, Any]] = json.loads(json.dumps(status))["pass_list"]
    return passes


def around(contents: MigratableState) -> int:
    """Return the stream bytes that belong to no pass."""
    return prelude_bytes(contents) + tail_bytes(contents)


def test_passes_add_up() -> None:
    """Initial, dirty and stop-copy passes, each with its pages, and together all that was sent."""
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    box.read_all()
    for page in (1, 2, 3):
        box.memories[0].store(page * PAGE, b"x" * PAGE)
    box.read_all()
    box.memories[0].store(4 * PAGE, b"x" * PAGE)
    box.migration.set_state(S.STOP_COPY)
    box.read_all()
    status = box.migration.save_status()
    assert status is not None
    passes = told(status)
    assert [entry["phase"] for entry in passes] == ["initial", "dirty", "stop_copy"]
    assert [entry["pages"] for entry in passes[1:]] == [3, 1]
    assert len(passes) == status["passes"]
    assert sum(entry["pages"] for entry in passes) == status["pages_sent"]
    sent = sum(entry["stream_bytes"] for entry in passes)
    assert sent + around(box.contents) == status["precopy_bytes"] + status["stop_copy_bytes"]  # type: ignore[operator]
    times = [entry["time"] for entry in passes]
    assert times == sorted(times)


def test_the_list_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that never ends keeps its most recent passes."""
    monkeypatch.setattr(save, "PASSES_KEPT", 3)
    box = filled()
    box.migration.set_state(S.PRE_COPY)
    box.read_all()
    for count in range(1, 6):
        for page in range(count):
            box.memories[0].store((page + 1) * PAGE, bytes([count]) * PAGE)
        box.read_all()
    status = box.migration.save_status()
    assert status is not None
    assert [entry["pages"] for entry in told(status)] == [3, 4, 5]
    assert status["passes"] == 6
