"""What `vfu-dev --version` prints: versions that others depend on, and what the installation carries."""

from __future__ import annotations

from vfu_dev import JSON_VERSION, __version__
from vfu_dev.builds import read_manifest
from vfu_dev.builds.pinned import VERSION
from vfu_dev.builds.prebuilt import CARRIED, prebuilt
from vfu_dev.libvfio_user import EXTENSION_VERSION
from vfu_dev.migration import STREAM_VERSION


def version_lines() -> list[str]:
    """Return the lines; the first is the program's version alone."""
    lines = [
        f"vfu-dev {__version__}",
        f"JSON {JSON_VERSION}, state stream {STREAM_VERSION}, extensions of libvfio-user {EXTENSION_VERSION}",
    ]
    found = [line for name in CARRIED if (line := _carried(name))]
    return lines + (found or ["carries no native parts: vfu-dev build makes them, vfu-dev doctor lists them"])


def _carried(name: str) -> str:
    if (folder := prebuilt(name)) is None:
        return ""
    manifest = read_manifest(folder)
    inputs = manifest["inputs"]
    assert isinstance(inputs, dict)
    text = f"carries {name} {manifest['key']}, built {manifest['built']}"
    if patches := inputs.get("patches"):
        text += f" from qemu {VERSION} with {len(patches)} patches of ours"
    return f"{text}; {inputs['compiler']}"
