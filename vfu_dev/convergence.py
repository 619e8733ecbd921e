"""Does a migration converge? QEMU's rule and its defaults, the verdict on measured rates, and the one text.

The rule is that of QEMU 10.2.2, migration/migration.c: every 100 ms bandwidth = bytes / time, and the VM is
stopped as soon as what remains is no more than threshold = bandwidth x downtime limit.
"""

from __future__ import annotations

from vfu_dev.sizes import format_size

WINDOW_SECONDS = 0.1  # BUFFER_DELAY, over which a bandwidth is measured
# migration/options.c: DEFAULT_MIGRATE_SET_DOWNTIME and DEFAULT_MIGRATE_MAX_BANDWIDTH.
DOWNTIME_LIMIT_SECONDS = 0.3
MAX_BANDWIDTH = 128 << 20

_VERDICTS = {True: "converging", False: "not converging", None: "too early to tell"}


def threshold_bytes(bandwidth: float, downtime_limit_seconds: float = DOWNTIME_LIMIT_SECONDS) -> float:
    """Return the bytes that may remain when the device is stopped; `bandwidth` in bytes a second."""
    return bandwidth * downtime_limit_seconds


def is_converging(dirty: float | None, transfer: float | None, *, stuck: bool) -> bool | None:
    """Return the verdict on two rates in bytes a second; None if it is not known.

    Args: stuck: the client itself found no less left than before. A transfer rate below the dirty rate
          alone is no proof: the client may have had other data to send.
    """
    if dirty is None or transfer is None:
        return None
    if transfer > dirty:
        return True
    return False if stuck else None


def sentence(
    converging: bool | None,
    dirty: float | None,
    transfer: float | None,
    remaining: float | None = None,
    threshold: float | None = None,
    *,
    all_read: bool = False,
    unless: str = "",
    transfer_note: str = "",
    threshold_note: str = "",
) -> str:
    """Return the verdict and the figures that decide it, such as:

    not converging: dirty rate 4 MiB/s > transfer rate 1 MiB/s (ratio 0.25), remaining 4 MiB > threshold 2 MiB

    Args: dirty, transfer: bytes a second. remaining, threshold: bytes. What is None is not known.
          all_read: nothing is left that can be sent in PRE_COPY.
          unless: why it is too early for a verdict, if known.
          transfer_note, threshold_note: what follows these numbers, in brackets.
    """
    if all_read and remaining is not None and threshold is not None and remaining > threshold:
        # QEMU sends nothing any more, and so measures no bandwidth; only the downtime limit is left.
        text = "waiting: nothing is left for PRE_COPY, and STOP_COPY has too much"
    elif dirty is None or transfer is None:
        text = "measuring rates"
    else:
        text = _VERDICTS[converging]
        if converging is None and unless:
            text += f", {unless}"
        text += f": {rates_text(dirty, transfer, transfer_note)}"
    if remaining is None:
        return text
    return f"{text}, {remaining_text(remaining, threshold, threshold_note)}"


def rates_text(dirty: float, transfer: float, note: str = "") -> str:
    """Return both rates, in bytes a second, and the second over the first."""
    sign = "<" if dirty < transfer else ">" if dirty > transfer else "="
    text = f"dirty rate {format_size(dirty)}/s {sign} transfer rate {format_size(transfer)}/s{note}"
    return text + (f" (ratio {transfer / dirty:.2f})" if dirty else "")


def remaining_text(remaining: float, threshold: float | None, note: str = "") -> str:
    """Return what remains beside what may, both in bytes."""
    text = f"remaining {format_size(remaining)}"
    if threshold is None:
        return text
    sign = "<=" if remaining <= threshold else ">"
    return f"{text} {sign} threshold {format_size(threshold)}{note}"


def threshold_note(source: str, bandwidth: float, downtime_limit_seconds: float) -> str:
    """Return in brackets what a threshold is made of; `source` says where the bandwidth comes from."""
    return f" ({source} {format_size(bandwidth)}/s x {downtime_limit_seconds * 1000:g} ms)"
