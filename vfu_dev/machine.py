"""Which machine this is, as far as figures depend on it."""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfu_dev.errors import judge_name

# The environment variable with a label of the user's own for this machine.
LABEL = "VFU_DEV_MACHINE"
# In this order: /etc/machine-id lasts as long as the installation, and is often missing in a container;
# boot_id is the running kernel's, which all containers on it share.
_SOURCES = (Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id"))
_ID_DIGITS = 12


def processor() -> str:
    """Return the model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or "unknown"


def machine_id() -> str:
    """Return what tells this machine from others in results: $VFU_DEV_MACHINE, or 12 hex digits.

    The digits are stable, and neither the machine nor its owner can be found by them: machine-id(5) asks for
    that, and for a keyed hash of it. They cover the processor too, since cloned machines often share
    /etc/machine-id.

    Raises: ConfigError: the label has control characters.
    """
    if label := os.environ.get(LABEL, "").strip():
        judge_name(LABEL, label)
        return label
    key = next((text for path in _SOURCES if (text := _text(path))), "")
    message = f"vfu-dev {processor()} {os.cpu_count()}"
    return hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()[:_ID_DIGITS]


def peak_resident_bytes() -> int:
    """Return the most memory that this process had resident so far: private, shared and of files; 0: unknown.

    getrusage(2) would count what the parent had when it started this process.
    """
    lines = _text(Path("/proc/self/status")).splitlines()
    sizes = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(next(sizes, "0")) * 1024


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Return a machine of a result in words; results of before November 2026 have no `id`."""
    what = f"{machine['processor']}, {machine['cores']} cores"
    return f"{machine['id']} ({what})" if "id" in machine else what


def anonymous(result: Any, names: dict[str, str]) -> Any:
    """Return a result, or a part of it, for publication: its machines lose what identifies them.

    Args: names: of the ids met so far, `machine-1` and so on; those met here are added. A kernel keeps its
              version, and loses the name of its build.
    """
    if isinstance(result, list):
        return [anonymous(one, names) for one in result]
    if not isinstance(result, dict):
        return result
    if not {"processor", "kernel"} <= result.keys():
        return {key: anonymous(value, names) for key, value in result.items()}
    version = re.match(r"[0-9.]*[0-9]", result["kernel"])
    machine = result | {"kernel": version[0] if version else "unknown"}
    if "id" in machine:
        machine["id"] = names.setdefault(machine["id"], f"machine-{len(names) + 1}")
    return machine


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two machines of results are one, as far as is known of both."""
    keys = [key for key in ("id", "processor", "cores") if key in one and key in other]
    return all(one[key] == other[key] for key in keys)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
