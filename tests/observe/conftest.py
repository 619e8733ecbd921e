"""Fixtures for what people look at: a pair of servers whose figures move."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from moves import MEMORY
from observekit import Browser, Pair, Web
from serverkit import PATIENCE_SECONDS, ServerFactory, wait_until

from vfu_dev.bench.peers import free_port


@pytest.fixture
def pair(serve: ServerFactory) -> Pair:
    """Return source and destination, both serving."""
    web, other = Web(free_port()), Web(free_port())
    source = serve("--fill", "1", "--metrics-port", str(web.port), memory=MEMORY, name="source")
    destination = serve("--metrics-port", str(other.port), memory=MEMORY, name="destination")
    for one in (web, other):
        wait_until(one.answers, "the metrics port answers")
    return Pair(source, destination, web, other)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return a headless browser; only outside CI may it be missing."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed (Debian: chromium)")
        pytest.skip("chromium is not installed (Debian: chromium)")
    return found


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Browser:
    """Return a function that opens a page for 2.5 s of its own time, with options of the browser."""

    def run(url: str, *options: str, seconds: float = PATIENCE_SECONDS) -> str:
        result = subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--hide-scrollbars",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=2500",
                *options,
                url,
            ],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
