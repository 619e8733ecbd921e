"""The significant lines of QEMU's VFIO trace: states, sizes left, the end."""

from __future__ import annotations

from typing import Any

from vfu_dev.qemu_events import Kind, kind_of

# Rows kept at the beginning and at the end; those between repeat each other.
HEAD_ROWS, TAIL_ROWS = 16, 24
# Events about sizes left or data moved: hundreds of each in a migration.
_SIZES = {Kind.ITERATE, Kind.PENDING_EXACT}
# Those, and the device's second event for each state of QEMU's state machine.
_NOISE = {
    Kind.BLOCK,
    Kind.PENDING_ESTIMATE,
    Kind.PRECOPY_INFO,
    Kind.STOP_COPY_SIZE,
    Kind.LOAD,
    Kind.DEVICE_STATE,
}


def short_name(device: str) -> str:
    """Return the distinct part of a device's name: QEMU names it by its socket's path or its sysfs folder."""
    return device.rpartition("/")[2].removesuffix(".vfio").removesuffix(".sock")


def excerpt(trace: list[dict[str, Any]], zero: float) -> dict[str, Any]:
    """Return rows for a table, and the number of rows left out of the middle.

    A row has `time` (seconds since `zero`, or None), `event`, `device`, and either `text` or sizes in bytes:
    `initial`, `dirty`, `stop_copy`. Figures equal to those of the previous row are left out.
    """
    rows: list[dict[str, Any]] = []
    before: dict[tuple[str, str], Any] = {}
    for event in trace:
        name, values, device = event.get("event", ""), event.get("values", {}), event.get("device", "")
        kind = kind_of(event)
        if kind in _NOISE or (kind in _SIZES and before.get((name, device)) == values):
            continue
        before[name, device] = values
        rows.append(
            {
                "time": event["time"] - zero if "time" in event else None,
                "event": name,
                "device": short_name(device),
                "text": "" if kind in _SIZES else event.get("state") or event.get("text", ""),
                **{key: values.get(key) for key in ("initial", "dirty", "stop_copy")},
            }
        )
    if len(rows) <= HEAD_ROWS + TAIL_ROWS + 1:
        return {"head": rows, "left_out": 0, "tail": []}
    return {
        "head": rows[:HEAD_ROWS],
        "left_out": len(rows) - HEAD_ROWS - TAIL_ROWS,
        "tail": rows[-TAIL_ROWS:],
    }
