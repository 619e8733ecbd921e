"""The live page in a real headless browser."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moves import CONVERGES, CONVERGES_SLOWLY, DOES_NOT_CONVERGE, move, moving
from observekit import Browser, Pair
from serverkit import wait_until

PICTURES = Path(__file__).parents[2] / "docs" / "img"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def url(pair: Pair) -> str:
    return f"http://127.0.0.1:{pair.web.port}/"


def points(dom: str, field: str) -> int:
    """Return how many points the curves of a field have."""
    paths = re.findall(r"<path[^>]*>", dom)
    return sum(path.count("L") + 1 for path in paths if f'data-field="{field}"' in path)


def test_the_page_draws_the_last_migration(pair: Pair, browse: Browser) -> None:
    """Curves, states and numbers of a migration that converged are in the page's DOM."""
    move(pair.source, pair.destination, CONVERGES)
    dom = browse(url(pair), "--dump-dom")
    assert "<title>source: " in dom
    assert "downtime of the last migration" in dom
    for field in (
        "initial_bytes",
        "dirty_bytes",
        "dirty_rate_bytes_per_second",
        "transfer_rate_bytes_per_second",
    ):
        assert points(dom, field) > 5, field
    assert points(dom, "predicted_downtime_seconds") > 5
    assert 'data-state="PRE_COPY"' in dom
    assert ">live<" in dom
    assert "Infinity" not in dom
    assert "NaN" not in dom


def test_the_page_says_that_a_migration_does_not_converge(pair: Pair, browse: Browser) -> None:
    with moving(pair.source, pair.destination, DOES_NOT_CONVERGE):
        wait_until(lambda: pair.web.status()["snapshot"]["forecast"]["converging"] is False, "the verdict")
        dom = browse(url(pair), "--dump-dom")
    assert re.search(r'<p id="verdict"[^>]*class="bad"[^>]*>not converging', dom)


def test_a_new_server_is_an_idle_page(pair: Pair, browse: Browser) -> None:
    dom = browse(url(pair), "--dump-dom")
    assert ">idle<" in dom
    assert ">live<" in dom


def take_picture(pair: Pair, browse: Browser, folder: Path, name: str) -> None:
    """Check a screenshot; VFU_DEV_UPDATE_PICTURES=1 puts it into docs/img."""
    picture = (PICTURES if os.environ.get("VFU_DEV_UPDATE_PICTURES") else folder) / name
    browse(url(pair), f"--screenshot={picture}", "--window-size=1180,960")
    assert picture.read_bytes().startswith(PNG_MAGIC)
    assert picture.stat().st_size > 20_000  # an empty page is smaller
    assert (PICTURES / name).exists()


def test_the_picture_of_a_migration_that_converged(pair: Pair, browse: Browser, tmp_path: Path) -> None:
    move(pair.source, pair.destination, CONVERGES_SLOWLY)
    take_picture(pair, browse, tmp_path, "live-page.png")


def test_the_picture_of_one_that_does_not(pair: Pair, browse: Browser, tmp_path: Path) -> None:
    with moving(pair.source, pair.destination, DOES_NOT_CONVERGE):
        # Three times over all of the memory: what a pass leaves is what the next one finds.
        wait_until(lambda: pair.web.status()["sequence"] > 120, "twelve seconds of it", 60)
        take_picture(pair, browse, tmp_path, "live-page-stuck.png")
