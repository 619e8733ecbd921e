"""What the figures say, in a sentence: the same on the live page and in `top`."""

from __future__ import annotations

from vfu_dev.convergence import sentence
from vfu_dev.figures.snapshot import Snapshot
from vfu_dev.sizes import format_size


def verdict(snapshot: Snapshot) -> str:
    """Return what is going on and how it will end."""
    forecast, state = snapshot.forecast, snapshot.state
    if state == "ERROR":
        return "in ERROR: only a reset helps"
    if state in ("PRE_COPY", "PRE_COPY_P2P"):
        dirty, transfer = forecast["dirty_rate_bytes_per_second"], forecast["transfer_rate_bytes_per_second"]
        unless = "the client has other data to send"
        return sentence(forecast["converging"], dirty, transfer, unless=unless)
    if state == "STOP_COPY":
        left = forecast["stop_copy_length_bytes"]
        return "the device is stopped" + ("" if left is None else f", {format_size(max(0, left))} to go")
    if state == "RESUMING":
        return "receiving state"
    if snapshot.last_downtime_seconds is not None:
        text = f"idle; measured downtime of the last migration {snapshot.last_downtime_seconds * 1000:.0f} ms"
        predicted = snapshot.last_predicted_downtime_seconds
        return text if predicted is None else f"{text}, predicted {predicted * 1000:.0f} ms"
    if snapshot.received_bytes:
        return f"idle; received {format_size(snapshot.received_bytes)} in the last migration"
    return "idle"
