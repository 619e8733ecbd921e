"""The live page in a real headless browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from contrastkit import contrast
from moves import CONVERGES, CONVERGES_SLOWLY, DOES_NOT_CONVERGE, move, moving
from observekit import LOOKS, Browser, Pair, take_picture
from serverkit import wait_until

import vfu_dev
from vfu_dev.uapi import DeviceState

PAGE = Path(vfu_dev.__file__).parent / "metrics" / "page.html"


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
    assert "measured downtime of the last migration" in dom
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
    said = r'<p id="verdict"[^>]*class="bad"[^>]*>not converging'
    with moving(pair.source, pair.destination, DOES_NOT_CONVERGE):
        wait_until(lambda: pair.web.status()["snapshot"]["forecast"]["converging"] is False, "the verdict")
        # Whenever the load gets no processor for a second, the verdict is another one.
        wait_until(lambda: re.search(said, browse(url(pair), "--dump-dom")), "the page says so")


def test_a_new_server_says_what_to_do(pair: Pair, browse: Browser) -> None:
    """No empty charts: a page without a migration names the commands that make one."""
    dom = browse(url(pair), "--dump-dom")
    assert ">idle<" in dom
    assert ">live<" in dom
    assert re.search(r'<div id="empty">', dom)
    assert "vfu-dev migrate SOCKET OTHER_SOCKET" in dom
    assert re.search(r'<div class="charts" id="charts" hidden', dom)


def test_the_curves_end_where_nothing_is_left(pair: Pair, browse: Browser) -> None:
    """After the stop the rest falls to zero; the downtime limit is a line, and the address says another."""
    move(pair.source, pair.destination, CONVERGES)
    dom = browse(f"{url(pair)}?limit=50", "--dump-dom")
    assert points(dom, "stopped_bytes") > 1
    (label,) = re.findall(r'aria-label="(Still to be sent: [^"]*)"', dom)
    assert label.endswith("after the stop 0 B")
    assert 'data-field="limit"' in dom
    assert "limit 50.0 ms" in dom
    # Every state that was held is named, however short it was.
    legend = re.search(r'<figcaption id="legend">(.*?)</figcaption>', dom)
    assert legend
    assert "PRE_COPY" in legend[1]
    assert "STOP" in legend[1]


def test_a_destination_shows_what_it_received(pair: Pair, browse: Browser) -> None:
    """Bytes, rate and outcome; nothing about what it would have to send."""
    move(pair.source, pair.destination, CONVERGES)
    dom = browse(f"http://127.0.0.1:{pair.other_web.port}/", "--dump-dom")
    assert points(dom, "transferred_bytes") > 2
    assert "<dt>Received in all</dt><dd>" in dom
    assert "<dt>Received in all</dt><dd>0 B</dd>" not in dom
    assert re.search(r">idle; received [\d.]+ MiB in the last migration<", dom)
    assert "<dt>Incoming migrations</dt><dd>1 completed</dd>" in dom
    assert "<dt>Dirty left</dt>" not in dom
    assert 'data-state="RESUMING"' in dom


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_contrast_of_the_page_is_enough(ground: str) -> None:
    """4.5 to 1 for text, labels of states included; 3 to 1 for curves and bars on their ground."""
    light, dark = (
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", part))
        for part in PAGE.read_text().partition("</style>")[0].split("@media (prefers", 1)
    )
    colours = light if ground == "light" else light | dark
    for text in ("ink", "dim", "bad", "good"):
        for under in ("ground", "card"):
            assert contrast(colours[text], colours[under]) >= 4.5, (text, under)
    for curve in ("a", "b", "c"):
        assert contrast(colours[curve], colours["card"]) >= 3, curve
    for state in DeviceState:
        name = state.name.lower().replace("_", "-")
        label = colours["on-error" if name == "error" else "on-state"]
        assert contrast(label, colours[name]) >= 4.5, name
        for under in ("ground", "card"):
            assert contrast(colours[name], colours[under]) >= 3, (name, under)


def test_the_pictures_of_a_migration_that_converged(pair: Pair, browse: Browser, tmp_path: Path) -> None:
    """Light, dark and 390 pixels wide; and the destination's."""
    move(pair.source, pair.destination, CONVERGES_SLOWLY)
    for look, options in LOOKS.items():
        take_picture(url(pair), browse, tmp_path, f"live-page{look}.png", *options)
    there = f"http://127.0.0.1:{pair.other_web.port}/"
    take_picture(there, browse, tmp_path, "live-page-destination.png", "--window-size=1180,570")


def test_the_picture_of_one_that_does_not(pair: Pair, browse: Browser, tmp_path: Path) -> None:
    with moving(pair.source, pair.destination, DOES_NOT_CONVERGE):
        # Three times over all of the memory: what a pass leaves is what the next one finds.
        wait_until(lambda: pair.web.status()["sequence"] > 120, "twelve seconds of it")
        take_picture(url(pair), browse, tmp_path, "live-page-stuck.png", *LOOKS[""])
