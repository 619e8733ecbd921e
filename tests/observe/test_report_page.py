"""The report of a migration in a real headless browser: light, dark and as wide as a phone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from observekit import LOOKS, PHONE_WIDTH, Browser, take_picture

from vfu_dev.cli import cli

DATA = Path(__file__).parents[1] / "unit" / "data"
# The report has no script; this one sends the page around it the widths of the window and of the content, and
# where the captions end.
MEASURE = """<script>
const ends = [...document.querySelectorAll("caption")].map(one => one.getBoundingClientRect().right);
const widths = [innerWidth, document.documentElement.scrollWidth, ...ends];
parent.postMessage(widths.map(Math.ceil).join(" "), "*");
</script>"""
# A window of the browser is 500 pixels wide at least, a frame is not.
AROUND = f"""<title>nothing</title>
<script>onmessage = event => document.title = event.data</script>
<iframe src="measured.html" width="{PHONE_WIDTH}" height="1580" style="border: 0"></iframe>"""


def page_of(name: str, folder: Path) -> Path:
    """Return the report of a migration, made by the command."""
    made = folder / f"{name}.html"
    done = CliRunner().invoke(cli, ["report", str(DATA / f"{name}.json"), "--out", str(made)])
    assert done.exit_code == 0, done.output
    return made


@pytest.mark.parametrize("name", ["lab-completed", "lab-not-converging"])
def test_nothing_is_wider_than_a_phone(name: str, tmp_path: Path, browse: Browser) -> None:
    """Pictures and tables scroll by themselves; captions are read without scrolling."""
    page = page_of(name, tmp_path)
    (tmp_path / "measured.html").write_text(page.read_text() + MEASURE)
    around = tmp_path / "around.html"
    around.write_text(AROUND)
    (measured,) = re.findall("<title>([0-9 ]+)</title>", browse(around.as_uri(), "--dump-dom"))
    window, content, *captions = (int(width) for width in measured.split())
    assert (window, content) == (PHONE_WIDTH, PHONE_WIDTH)
    assert len(captions) >= 3
    assert max(captions) <= PHONE_WIDTH


def test_the_pictures_of_a_report(tmp_path: Path, browse: Browser) -> None:
    """Light, dark and 390 pixels wide."""
    page = page_of("lab-completed", tmp_path)
    for look, options in LOOKS.items():
        take_picture(page.as_uri(), browse, tmp_path, f"report-page{look}.png", *options)
