"""What `vfu-dev lab` prints of one move."""

from __future__ import annotations

from typing import Any

from vfu_dev.lab.policy import step_text
from vfu_dev.report.qemus import link_text, qemus_text
from vfu_dev.sizes import format_count, format_size
from vfu_dev.workload import Workload


def _compared(guest: dict[str, Any]) -> str:
    """Say what was read back, how, and how much of it was wrong."""
    if guest["verified"] is None:
        return "nothing was read back"
    way = "by DMA" if guest["verify_via"] == "dma" else "by MMIO"
    text = f"{format_size(guest['compared_bytes'])} compared {way}"
    text += f" in {guest['verify_seconds']:.1f} s, {guest['mismatched_bytes']} bytes differ"
    if guest["sampled_words"]:
        text += f"; {guest['sampled_words']} words by MMIO, {guest['sampled_wrong_words']} differ"
    return text


def summary(result: dict[str, Any], load: Workload) -> list[str]:
    """Return the lines that show the JSON of a move to people; `load` is what was asked for."""
    qemu, guest = result["qemu"], result["guest"]
    accel = f" ({qemu['accel']})" if qemu["accel"] else ""
    lines = [f"migration {result['status']}, QEMU {qemus_text(qemu)}{accel}"]
    for device in result["devices"]:
        moved = device["precopy_bytes"] + device["stop_copy_bytes"]
        share = f" ({100 * device['precopy_bytes'] / moved:.0f} % in pre-copy)" if moved else ""
        match = "equal" if device["digest_match"] else "DIFFERENT" if device["digest_source"] else "not taken"
        sizes = ", ".join(
            f"{label} {format_size(device[key])}"
            for label, key in (
                ("initial", "initial_bytes"),
                ("pre-copy", "precopy_bytes"),
                ("stop-copy", "stop_copy_bytes"),
            )
        )
        passes = format_count(device["passes"], "pass")
        lines.append(f"{device['name']}: {sizes}{share}, {passes}, digests {match}")
        if device["downtime_seconds"] is not None:
            predicted = device["predicted_downtime_seconds"]
            told = "" if predicted is None else f", predicted downtime {predicted * 1000:.0f} ms"
            measured = f"measured downtime {device['downtime_seconds'] * 1000:.0f} ms"
            lines.append(f"{device['name']}: {measured}{told}")
    if qemu["downtime_ms"] is not None:
        limit = qemu["downtime_limit_ms"]
        lines.append(
            f"measured downtime {qemu['downtime_ms']} ms (limit {limit} ms), total {qemu['total_ms']} ms"
        )
    elif qemu["run_state_source"] is not None:
        lines.append(f"the VM on the source is {qemu['run_state_source']}")
    lines += [f"the policy set {step_text(step)}" for step in result["policy"]]
    if result["link"] is not None:
        lines.append(link_text(result["link"]))
    if result["clocks"] is not None:
        lines.append(result["clocks"]["text"])
    for device, status in zip(result["devices"], result["load_status"], strict=False):
        if "asked_rate_bytes" not in status:
            continue  # it has no memory to write to
        lines.append(f"{device['name']}: its own engine wrote {load.reached_text(status)}")
    if guest is not None:
        lines.append(f"guest {guest['kind']}: {_compared(guest)}, {guest['writes']} writes")
    lines += [f"warning: {text}" for text in result["warnings"]]
    return lines + [f"PROBLEM: {text}" for text in result["problems"]]
