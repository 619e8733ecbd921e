"""What the tests of deploy/ share."""

from __future__ import annotations

from pathlib import Path

import pytest
from promkit import program

from vfu_dev.builds import BuildError


@pytest.fixture(scope="session")
def promtool() -> Path:
    """Return promtool; where there is neither one nor apt, the test is skipped and says so."""
    try:
        return program("promtool")
    except BuildError as error:
        pytest.skip(str(error))
