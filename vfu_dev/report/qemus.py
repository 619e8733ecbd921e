"""Which QEMUs took part in a migration, in words."""

from __future__ import annotations

from typing import Any


def qemus_text(qemu: dict[str, Any]) -> str:
    """Return version and front end of the QEMU, or of both where they differ, from a report's `qemu`."""
    if "source" not in qemu:  # written before the hosts could differ
        return str(qemu["version"])
    described = []
    for side in (qemu["source"], qemu["destination"]):
        path = f" over {side['iommu']}" if side["iommu"] else ""
        described.append(f"{side['version']} with {side['front_end']}{path}")
    return " to ".join(dict.fromkeys(described))
