"""Pages and pictures from stored results of real runs (see data/), and from damaged ones."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from contrastkit import contrast
from matplotlib.patches import Rectangle

from vfu_dev.cli.report import command
from vfu_dev.errors import ConfigError
from vfu_dev.report.drawing import INK, NAMES
from vfu_dev.report.excerpt import HEAD_ROWS, TAIL_ROWS, excerpt
from vfu_dev.report.page import LINES, blaming, read_report, render
from vfu_dev.report.passes import passes_figure
from vfu_dev.report.plots import LIGHT_STATES, STATE_COLOURS, migration_figure
from vfu_dev.report.switchover import switchover
from vfu_dev.report.timeline import Series

DATA = Path(__file__).parent / "data"
COMPLETED, NOT_CONVERGING = DATA / "lab-completed.json", DATA / "lab-not-converging.json"
STYLE = Path(migration_figure.__code__.co_filename).with_name("style.html.j2")
MAX_BYTES = 500 << 10


def stored(path: Path) -> dict[str, Any]:
    """Return a stored result."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.fixture(scope="module")
def completed() -> str:
    """The page of a migration that converged."""
    return render(stored(COMPLETED))


@pytest.fixture(scope="module")
def not_converging() -> str:
    """The page of one that did not, and was cancelled."""
    return render(stored(NOT_CONVERGING))


def test_completed_page_has_every_part(completed: str) -> None:
    """Verification, convergence, downtimes, curves, passes, trace, versions and command lines."""
    result = stored(COMPLETED)
    for heading in (
        "Verification", "Does it converge?", "Downtime", "Switchover", "Over time", "Passes",
        "QEMU's VFIO trace", "Versions and command lines",
    ):  # fmt: skip
        shown = html.escape(heading).replace("&#x27;", "&#39;")
        identity = re.search(rf'<h2 id="([a-z]+)"><a href="#\1">{re.escape(shown)}</a></h2>', completed)
        assert identity, heading
        assert f'<li><a href="#{identity[1]}">{shown}</a></li>' in completed
    device = result["devices"][0]
    assert device["digest_source"] in completed
    assert "0 bytes differ" in completed
    assert f'<td class="n">{result["qemu"]["downtime_ms"]} ms</td>' in completed
    assert f"{device['downtime_seconds'] * 1000:.1f} ms" in completed
    assert completed.count("<svg") == 4
    assert "vfio-user-pci" in completed
    assert result["versions"]["qemu"] in completed
    assert 'class="bad"' not in completed


def test_page_of_a_migration_that_did_not_converge_says_so(not_converging: str) -> None:
    """In its title, in its first box with the numbers that decide, and about the source that goes on."""
    assert "<title>vfu-dev: migration cancelled, not converging</title>" in not_converging
    found = re.search(
        r"not converging: dirty rate [\d.]+ MiB/s &gt; transfer rate [\d.]+ MiB/s \(ratio 0\.\d\d\), "
        r"remaining [\d.]+ MiB &gt; threshold [\d.]+ MiB",
        not_converging,
    )
    assert found
    assert found.start() < not_converging.index("<h2")
    assert "The state did not move" in not_converging
    assert "The VM on the source is <b>running</b>" in not_converging
    assert "digests differ" not in not_converging


def test_the_outcome_is_the_first_thing(completed: str, not_converging: str) -> None:
    """Downtime beside its limit, and what was compared, in the heading; what did not complete says that."""
    qemu = stored(COMPLETED)["qemu"]
    (heading,) = re.findall(r"<h1>(.*)</h1>", completed)
    text = re.sub(r"<[^>]+>", "", heading)
    stood = f"{qemu['downtime_ms']} ms of {qemu['downtime_limit_ms']} ms"
    assert text == f"Live migration: completed, {stood}, verified"
    assert "cancelled, not converging</span></h1>" in not_converging
    wrong = stored(COMPLETED)
    wrong["guest"]["verified"] = False
    assert "NOT as it was</span></h1>" in render(wrong)


def test_a_downtime_above_its_limit_is_said_and_not_green() -> None:
    late = stored(COMPLETED)
    late["qemu"]["downtime_ms"] = late["qemu"]["downtime_limit_ms"] + 1
    (heading,) = re.findall(r"<h1>(.*)</h1>", render(late))
    assert 'class=""' in heading
    assert "301 ms above the limit of 300 ms, verified" in heading


def test_the_switchover_is_shown_alone() -> None:
    """In order and without gaps, in milliseconds since the stop; what did not stop has none."""
    held = switchover(stored(COMPLETED))
    source = [one for one in held if one.side == "source"]
    assert [one.state for one in source][-2:] == ["STOP_COPY", "STOP"]
    for one, other in pairwise(source):
        assert one.start_ms + one.duration_ms == pytest.approx(other.start_ms)
    assert any(one.start_ms == pytest.approx(0) for one in source)
    assert [one.state for one in held if one.side == "destination"][-1] == "RUNNING"
    assert switchover(stored(NOT_CONVERGING)) == []


def test_everything_has_a_name_for_screen_readers(completed: str) -> None:
    """Pictures a label, tables a caption and headings with a scope."""
    assert completed.count('<svg role="img" aria-label="') == completed.count("<svg")
    assert completed.count("<caption>") == completed.count("<table")
    assert not re.search(r"<th(?! scope=)[ >]", completed)


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_contrast_is_enough(ground: str) -> None:
    """4.5 to 1 for all text, labels on bars included; 3 to 1 for curves and bars."""
    style = STYLE.read_text()
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media (prefers", 1)
    )
    colours = light if ground == "light" else dark
    assert set(light) == set(dark)
    for text in ("ink", "dim", "link", "good", "bad"):
        for under in ("ground", "card"):
            assert contrast(colours[text], colours[under]) >= 4.5, (text, under)
    assert contrast(colours["bad"], colours["bad-ground"]) >= 4.5
    assert contrast(colours["ink"], colours["calm-ground"]) >= 4.5
    for name in ("blue", "sky", "orange", "red", "green", "pink", "grey"):
        assert contrast(colours[name], colours["ground"]) >= 3, name
    for state, colour in STATE_COLOURS.items():
        shown = colours.get(NAMES.get(colour, ""), colours["ink"] if state == "ERROR" else colour)
        label = INK if state in LIGHT_STATES else colours["on-bar"]
        assert contrast(label, shown) >= 4.5, state
        assert contrast(shown, colours["ground"]) >= 3, state


@pytest.mark.parametrize("path", [COMPLETED, NOT_CONVERGING])
def test_page_is_small_valid_and_needs_no_network(path: Path) -> None:
    """Nothing to fetch, nothing to run, every id once."""
    page = render(stored(path))
    assert len(page.encode()) < MAX_BYTES
    assert "<script" not in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", page.replace("xlink:href", "href"))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_same_result_gives_the_same_page(completed: str) -> None:
    """A page made again differs in nothing."""
    assert render(stored(COMPLETED)) == completed


def test_long_run_stays_small() -> None:
    """Three minutes of samples and trace are thinned; the page is still one that is mailed around."""
    result = stored(NOT_CONVERGING)
    last = result["samples"][-1]
    table = result["devices"][0]["samples_source"]
    trace = result["qemu"]["trace_source"]
    for i in range(3000):
        result["samples"].append({**last, "time": last["time"] + i * 0.06})
        table["rows"].append([table["rows"][-1][0] + 0.1, *table["rows"][i][1:]])
        trace.append({**trace[i], "time": trace[i].get("time", 0) + 1})
    assert len(render(result).encode()) < MAX_BYTES


def test_lines_left_out_of_the_trace_are_counted() -> None:
    """An event that stands for equal ones before it says so, and they are among the lines of the trace."""
    result = stored(COMPLETED)
    trace = result["qemu"]["trace_source"]
    before = render(result)
    trace[3]["repeated"] = 9_990
    page = render(result)
    shown = min(len(trace), LINES)
    assert f"({shown} of {len(trace)} lines)" in before
    assert f"({shown} of {len(trace) + 9_990} lines)" in page
    added = [line.strip() for line in page.splitlines() if "with the answer of the next line" in line]
    assert added == ["… 9990 more with the answer of the next line"]
    assert page.splitlines()[page.splitlines().index(" " * 11 + added[0]) + 1].endswith(trace[3]["text"])


def test_downtimes_share_one_axis() -> None:
    """Our prediction, QEMU's expectation, both measures and the limit are curves of the same panel."""
    axes = migration_figure(stored(COMPLETED)).axes[3]
    labels = " ".join(str(line.get_label()).replace("\n", " ") for line in axes.get_lines())
    for text in ("predicted", "expected-downtime (RAM only)", "measured downtime (the device",
                 "measured downtime (QEMU)", "downtime limit 300 ms"):  # fmt: skip
        assert text in labels
    assert {tuple(each.get_xlim()) for each in migration_figure(stored(COMPLETED)).axes[:5]} == {
        tuple(axes.get_xlim())
    }


def test_a_bar_for_each_pass() -> None:
    """As many bars as passes, with their bytes in MiB and their pages."""
    result = stored(NOT_CONVERGING)
    figure = passes_figure(result)
    assert figure is not None
    passes = result["devices"][0]["save"]["pass_list"]
    heights = [
        sorted(patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle))
        for axes in figure.axes
    ]
    assert heights[0] == pytest.approx(sorted(entry["stream_bytes"] / (1 << 20) for entry in passes))
    assert heights[1] == sorted(entry["pages"] for entry in passes)


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    """Return what removes a key, of every device where `path` begins with `devices`."""

    def change(result: dict[str, Any]) -> None:
        if path[0] == "devices":
            for device in result["devices"]:
                device.pop(path[1])
        elif len(path) == 2:
            result[path[0]].pop(path[1])
        else:
            result.pop(path[0])

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("convergence"),
        without("devices", "samples_source"),
        without("devices", "downtime_seconds"),
        without("devices", "predicted_downtime_seconds"),
        without("qemu", "expected_downtime_ms"),
        without("qemu", "run_state_source"),
        lambda result: result.update(samples=[], devices=[], guest=None),
        lambda result: result["devices"][0].update(save=None, resume=None, transitions_source=[]),
        lambda result: result["qemu"].update(trace_source=[], status="failed", downtime_ms=None),
    ],
)
def test_older_and_poorer_results_give_a_page(change: Callable[[dict[str, Any]], None]) -> None:
    """What an older version did not write, or a run that ended early did not learn, is left out."""
    result = stored(COMPLETED)
    change(result)
    page = render(result)
    assert "</html>" in page
    assert "Undefined" not in page


def test_text_of_a_guest_cannot_become_markup() -> None:
    """Errors come from elsewhere and are quoted."""
    result = stored(NOT_CONVERGING)
    result["problems"] = ["<b>bold</b>"]
    result["qemu"]["trace_source"][0]["text"] = "</pre><b>trace</b>"
    page = render(result)
    assert "<b>bold" not in page
    assert "<b>trace" not in page


def test_command_makes_page_and_pictures(tmp_path: Path) -> None:
    """The page lies beside the JSON unless told otherwise; pictures go where they should."""
    path = tmp_path / "report.json"
    path.write_text(COMPLETED.read_text())
    done = CliRunner().invoke(command, [str(path), "--png", str(tmp_path / "png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").read_text() == render(stored(COMPLETED))
    for name in ("migration", "passes", "phases"):
        assert (tmp_path / "png" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    elsewhere = tmp_path / "new" / "page.html"
    assert CliRunner().invoke(command, [str(path), "--out", str(elsewhere)]).exit_code == 0
    assert elsewhere.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a result"),
        ('{"kind": "bench"}', "'bench'"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, content: str | None, words: str) -> None:
    """A missing file, no JSON, and the JSON of something else."""
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_report(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "version 99: expected 1 to 2"),
        ({"version": 0}, "version 0"),
        ({"version": "1"}, "version '1'"),
        ({"version": None}, "version None"),
        ({"version": True}, "version True"),
        ({"devices": ...}, "the result has no 'devices'"),
        ({"qemu": ...}, "the result has no 'qemu'"),
        ({"devices": 7}, "the result holds something unexpected"),
        ({"started": 1e308}, "the result holds something unexpected"),  # beyond every clock
    ],
)
def test_a_result_of_another_version_or_shape_is_one_line(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """The line names the file, and the version or the key."""
    from vfu_dev.cli import main

    path = tmp_path / "report.json"
    result = stored(COMPLETED) | change
    path.write_text(json.dumps({key: value for key, value in result.items() if value is not ...}))
    with pytest.raises(ConfigError, match=re.escape(words)) as caught, blaming(path):
        render(read_report(path))
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path)])
    assert ended.value.code == 2
    assert not path.with_suffix(".html").exists()


def test_excerpt_leaves_out_the_middle_and_what_repeats() -> None:
    """Equal figures in a row are one row; a long trace keeps its beginning and its end."""

    def event(number: int, dirty: int) -> dict[str, Any]:
        values = {"initial": 0, "dirty": dirty}
        return {"event": "vfio_save_iterate", "device": "d", "time": 5.0 + number, "values": values}

    assert len(excerpt([event(0, 1), event(1, 1), event(2, 2)], 5.0)["head"]) == 2
    found = excerpt([event(i, i) for i in range(200)], 5.0)
    assert (len(found["head"]), len(found["tail"])) == (HEAD_ROWS, TAIL_ROWS)
    assert found["left_out"] == 200 - HEAD_ROWS - TAIL_ROWS
    assert found["tail"][-1]["time"] == 199.0


def test_thinning_keeps_peaks() -> None:
    """Lowest and highest points survive, in order."""
    series = Series([float(i) for i in range(10_000)], [float(i % 7) for i in range(10_000)])
    series.values[5_003] = 99.0
    thin = series.thin(100)
    assert len(thin.times) <= 102
    assert max(thin.values) == 99.0
    assert thin.times == sorted(thin.times)
