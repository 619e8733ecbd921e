"""The telling lines of QEMU's VFIO trace: states, what is left, the end."""

from __future__ import annotations

from typing import Any

# Rows at the beginning and at the end; what lies between repeats itself.
HEAD_ROWS, TAIL_ROWS = 16, 24
# Events that say how much is left, or move data: hundreds of each.
_SIZES = {"vfio_save_iterate", "vfio_state_pending_exact"}
# Those, and a second word about each state, to the device instead of from QEMU's state machine.
_NOISE = {
    "vfio_save_block",
    "vfio_state_pending_estimate",
    "vfio_load_state_device_data",
    "vfio_migration_set_device_state",
}


def short_name(device: str) -> str:
    """Return what tells devices apart: QEMU names a vfio-user device by the whole path of its socket."""
    return device.rpartition("/")[2].removesuffix(".sock")


def excerpt(trace: list[dict[str, Any]], zero: float) -> dict[str, Any]:
    """Return rows for a table, and how many between the first and the last of them are left out.

    A row has `time` (seconds since `zero`, or None), `event`, `device`, and either `text` or sizes in bytes:
    `initial`, `dirty`, `stop_copy`. Figures that are those of the row before are left out.
    """
    rows: list[dict[str, Any]] = []
    before: dict[tuple[str, str], Any] = {}
    for event in trace:
        name, values, device = event.get("event", ""), event.get("values", {}), event.get("device", "")
        if name in _NOISE or (name in _SIZES and before.get((name, device)) == values):
            continue
        before[name, device] = values
        rows.append(
            {
                "time": event["time"] - zero if "time" in event else None,
                "event": name,
                "device": short_name(device),
                "text": "" if name in _SIZES else event.get("state") or event.get("text", ""),
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
