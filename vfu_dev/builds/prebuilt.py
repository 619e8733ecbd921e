"""The artifacts inside a platform wheel, one folder each; `make wheel` puts them there.

    vfu_dev/_prebuilt/NAME/       the artifact's files and its manifest.json
    vfu_dev/_prebuilt/SOURCES.md  the sources of the parts, and where to get them
    vfu_dev/_prebuilt/licences/   the licences of all parts

A checkout has none, and neither has a wheel without native parts.
"""

from __future__ import annotations

from pathlib import Path

import vfu_dev

# In the order in which `vfu-dev --version` names them.
CARRIED = ("libvfio-user", "vfu-kernels", "vfio-preload", "guest-programs")


def prebuilt_root() -> Path:
    """Return the folder that holds them, which may not exist."""
    return Path(vfu_dev.__file__).resolve().parent / "_prebuilt"


def prebuilt(name: str) -> Path | None:
    """Return the folder of the artifact `name`; None if this installation does not contain it."""
    folder = prebuilt_root() / name
    return folder if folder.is_dir() else None
