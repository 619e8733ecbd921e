"""Where the C sources and patches of this project are."""

from __future__ import annotations

from pathlib import Path

import vfu_dev
from vfu_dev.errors import BuildError


def native_dir() -> Path:
    """Return native/: of the checkout that this package runs from, else the copy that the wheel carries.

    Raises: BuildError: neither is there.
    """
    package = Path(vfu_dev.__file__).resolve().parent
    for folder in (package.parent / "native", package / "_native"):
        if folder.is_dir():
            return folder
    raise BuildError(f"native/ is neither beside nor in {package}: the installation is incomplete")
