"""What a platform wheel carries ready made: some artifacts, one folder each, as `make wheel` put them there.

    vfu_dev/_prebuilt/NAME/       the artifact's files and its manifest.json
    vfu_dev/_prebuilt/SOURCES.md  what the parts are made of, and where their sources are
    vfu_dev/_prebuilt/licences/   the licences of all of it

A checkout, and a wheel that is made without native parts, has none.
"""

from __future__ import annotations

from pathlib import Path

import vfu_dev

# In the order in which `vfu-dev --version` names them.
CARRIED = ("libvfio-user", "vfu-kernels", "vfio-preload", "guest-programs")


def prebuilt_root() -> Path:
    """Return the folder that holds them, whether it is there or not."""
    return Path(vfu_dev.__file__).resolve().parent / "_prebuilt"


def prebuilt(name: str) -> Path | None:
    """Return the folder of the artifact `name`; None where this installation does not carry it."""
    folder = prebuilt_root() / name
    return folder if folder.is_dir() else None
