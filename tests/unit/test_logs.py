"""Log lines: the same figures in words and as fields."""

from __future__ import annotations

import json
import logging
from datetime import datetime

import numpy as np
import pytest

from vfu_dev.logs import JsonFormatter
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import MigratableState, Migration
from vfu_dev.uapi import DeviceState


def as_json(record: logging.LogRecord) -> dict[str, object]:
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return json.loads(line)


def migrated(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the records of a whole outgoing migration of 1 MiB."""
    caplog.set_level(logging.INFO, "vfu_dev")
    memory = DeviceMemory("memory", 1 << 20, 4096)
    memory.store(0, np.arange(1 << 17, dtype=np.uint64).tobytes())
    migration = Migration("gpu0", MigratableState("test", [memory], []))
    migration.set_state(DeviceState.PRE_COPY)
    buffer = memoryview(bytearray(1 << 16))
    while migration.read_into(buffer):
        pass
    migration.set_state(DeviceState.STOP_COPY)
    while migration.read_into(buffer):
        pass
    migration.set_state(DeviceState.STOP)
    memory.close()
    return [record for record in caplog.records if "->" in record.getMessage()]


def test_every_change_of_state_is_a_line_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    lines = [as_json(record) for record in migrated(caplog)]
    states = [(line["from"], line["to"]) for line in lines]
    assert states == [
        ("RUNNING", "PRE_COPY"),
        ("PRE_COPY", "PRE_COPY_P2P"),
        ("PRE_COPY_P2P", "STOP_COPY"),
        ("STOP_COPY", "STOP"),
    ]
    for line in lines:
        assert line["event"] == "state"
        assert line["device"] == "gpu0"
        assert line["level"] == "info"
        assert datetime.fromisoformat(str(line["time"])).utcoffset() is not None
    assert isinstance(lines[0]["initial_bytes"], int)
    assert lines[0]["initial_bytes"] > 1 << 20
    last = lines[-1]
    assert last["precopy_bytes"] == lines[0]["initial_bytes"]
    assert last["pages_sent"] == 256
    assert last["save_status"] == "completed"
    assert isinstance(last["downtime_seconds"], float)
    assert last["downtime_seconds"] > 0


def test_the_words_say_what_the_fields_say(caplog: pytest.LogCaptureFixture) -> None:
    text = migrated(caplog)[-1].getMessage()
    assert text.startswith("gpu0: STOP_COPY -> STOP: pre-copy 1 MiB, stop-copy ")
    assert "256 pages (0 again), completed" in text
    assert ", measured " in text


def test_a_traceback_and_odd_names_stay_one_line() -> None:
    try:
        raise ValueError("two\nlines \udcff")
    except ValueError:
        import sys

        record = logging.LogRecord("vfu_dev.x", logging.ERROR, "f", 1, "%s failed", ("a\nb",), sys.exc_info())
    entry = as_json(record)
    assert entry["message"] == "a\nb failed"
    assert "ValueError" in str(entry["traceback"])
