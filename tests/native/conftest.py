"""The pinned source tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfu_dev.builds import Cache
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.fetch import unpacked
from vfu_dev.builds.progress import Reporter


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pinned QEMU source, Debian's patches applied; not to be written to."""
    log = tmp_path_factory.mktemp("sources") / "log"
    return unpacked(BuildContext(Cache(), Reporter(), log, jobs=1))
