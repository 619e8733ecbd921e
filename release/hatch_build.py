"""What hatchling does not do by itself: a README that can be read alone, and wheels with native parts.

VFU_DEV_STAGE names a folder that make_wheel.py filled: `prebuilt/` goes into the package, `share/` beside it
(manual pages, shell completion). Without it the wheel is pure Python, and its user builds the native parts.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

STAGE = "VFU_DEV_STAGE"
# Of the sources; what is linked into the native parts of a platform wheel comes on top.
LICENCE = "BSD-3-Clause AND GPL-2.0-or-later"
CARRIED_LICENCES = "AND LGPL-2.1-or-later AND MIT"

_IMAGE = re.compile(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n?", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def alone(readme: str) -> str:
    """Return the README without links and pictures that are files beside it.

    A page of docs/ is named by the command that shows it; of everything else the words stay.
    """
    parts = _FENCE.split(readme)
    parts[::2] = [_LINK.sub(_named, _IMAGE.sub("", part)) for part in parts[::2]]
    return "".join(parts)


def _named(found: re.Match[str]) -> str:
    text, target = found[1], found[2].partition("#")[0]
    page = re.fullmatch(r"docs/([\w-]+)\.md", target)
    if page is None:
        return f"`{text}`" if text == target else text
    command = f"`vfu-dev docs {page[1]}`"
    return command if text == target else f"{text} ({command})"


class CustomMetadataHook(MetadataHookInterface):
    """Fills in the fields that pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme` and `license`."""
        text = alone(Path(self.root, "README.md").read_text())
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        carried = f" {CARRIED_LICENCES}" if os.environ.get(STAGE) else ""
        metadata["license"] = LICENCE + carried


class CustomBuildHook(BuildHookInterface[Any]):
    """Puts pages and staged files into a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add files, and with native parts this machine's tag; auditwheel makes it a manylinux tag."""
        if self.target_name != "wheel" or version == "editable":
            return
        root = Path(self.root)
        for page in [*root.glob("docs/*.md"), *root.glob("docs/examples/*.py")]:
            inside = page.relative_to(root / "docs").as_posix()
            build_data["force_include"][str(page)] = f"vfu_dev/_docs/{inside}"
        if not (stage := os.environ.get(STAGE)):
            return
        build_data["force_include"][str(Path(stage, "prebuilt"))] = "vfu_dev/_prebuilt"
        build_data["shared_data"][str(Path(stage, "share"))] = "share"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sys.platform}_{platform.machine()}"
