"""Fixtures of the unit tests: small records, and a build in a cache of its own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from migrationkit import use_small_records

from vfu_dev.builds.cache import Cache
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.progress import Reporter


@pytest.fixture
def small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a stream of a few pages consist of several records."""
    use_small_records(monkeypatch)


@pytest.fixture
def out() -> io.StringIO:
    """Return what a build says."""
    return io.StringIO()


@pytest.fixture
def context(tmp_path: Path, out: io.StringIO) -> BuildContext:
    """Return a build in an empty cache, which says everything at once."""
    cache = Cache(tmp_path / "cache")
    return BuildContext(cache, Reporter(out, interval_seconds=0.0), cache.log_path("test", "k"), jobs=1)
