"""Text about the QEMUs and the link of a migration."""

from __future__ import annotations

from typing import Any

from vfu_dev.sizes import format_size


def qemus_text(qemu: dict[str, Any]) -> str:
    """Return version and front end of the QEMU, or of both where they differ, from a report's `qemu`."""
    if "source" not in qemu:  # written before the hosts could differ
        return str(qemu["version"])
    described = []
    for side in (qemu["source"], qemu["destination"]):
        path = f" over {side['iommu']}" if side["iommu"] else ""
        front_end = f" with {side['front_end']}" if side["front_end"] else ""
        described.append(f"{side['version']}{front_end}{path}")
    return " to ".join(dict.fromkeys(described))


def link_text(link: dict[str, Any]) -> str:
    """Return a link's requested limits, who set them, and its measured rate, from a report's `link`."""
    by = [f"{what} by {link[f'{what}_by']}" for what in ("rate", "delay", "loss") if link[f"{what}_by"]]
    text = f"link {link['asked']} ({', '.join(by)}): carried {format_size(link['carried_bytes'])}"
    if (measured := link["measured_bytes_per_second"]) is not None:
        text += f", at most {format_size(measured)}/s ({measured * 8 / 1e6:.4g} Mbit/s)"
    if link["rate_bytes_per_second"]:
        asked = link["rate_bytes_per_second"]
        text += f"; {format_size(asked)}/s ({asked * 8 / 1e6:.4g} Mbit/s) asked"
    return text
