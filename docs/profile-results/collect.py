"""The tables of docs/profile-results.md: `python docs/profile-results/collect.py run FOLDER` makes them anew.

It runs the scenarios beside this file with each QEMU, each result in FOLDER, and writes results.json and the
page. `python docs/profile-results/collect.py docs/profile-results.md` writes the page from results.json.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfu_dev.cli import EXIT_LESS
from vfu_dev.convergence import DOWNTIME_LIMIT_SECONDS, MAX_BANDWIDTH
from vfu_dev.generated import renewed
from vfu_dev.machine import anonymous
from vfu_dev.profile import Profile, read_profile
from vfu_dev.profile.shipped import profile_path
from vfu_dev.replay.predict import ReplayPrediction, predict_replay
from vfu_dev.replay.scale import scaled
from vfu_dev.series.summary import read_summary
from vfu_dev.sizes import format_size

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "profile-results.md"
COMMAND = "python docs/profile-results/collect.py"

# The names of the lab's --qemu. All of them attach the device with QEMU's own vfio-pci.
QEMUS = ("bookworm-backports", "patched", "trixie-backports")
# Of the page.
SCENARIOS = ("mlx5", "connectx7", "virtio", "small", "exact", "vgpu")
# Downtimes in milliseconds; the profiles name their sources.
PUBLISHED = {
    ("mlx5", "off"): 1900,
    ("mlx5", "on"): 420,
    ("connectx7", "one"): 366,
    ("connectx7", "two"): 556,
    ("connectx7", "four"): 1095,
}
# Ratios of downtimes: scenario, numerator, denominator, what was published.
RATIOS = (
    ("mlx5", "off", "on", f"{PUBLISHED['mlx5', 'off'] / PUBLISHED['mlx5', 'on']:.2f}"),
    ("connectx7", "two", "one", f"{PUBLISHED['connectx7', 'two'] / PUBLISHED['connectx7', 'one']:.2f}"),
    ("connectx7", "four", "one", f"{PUBLISHED['connectx7', 'four'] / PUBLISHED['connectx7', 'one']:.2f}"),
    ("virtio", "with", "without", "0.25 to 0.30"),
)
# The lab's own trace of one migration of this profile, with QEMU's defaults, given up after some seconds.
TRACED = ("--profile", "exact-21gb", "--memory", "4K", "--pattern", "idle", "--timeout", "6")


@dataclass(frozen=True)
class Replayed:
    """The profile that a point names, scaled."""

    profile: Profile
    scale: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Replayed:
        """Return what these settings of a point replay."""
        named, scale = settings["device.profile"], settings["device.scale"]
        beside = HERE / named
        path = beside if beside.is_file() else profile_path(named)
        return cls(scaled(read_profile(path), scale), scale)

    def predict(self, settings: Mapping[str, Any]) -> ReplayPrediction:
        """Return what the profile's figures make of the point. QEMU measures the maximum."""
        bandwidth = settings["qemu.max-bandwidth"] or math.inf
        decides = settings["qemu.avail-switchover-bandwidth"] or bandwidth
        return predict_replay(
            self.profile,
            decides * settings["qemu.downtime-limit"] / 1000,
            bandwidth,
            devices=settings["device.devices"],
            switchover_ack=settings["qemu.switchover-ack"],
            parallel=bool(settings.get("qemu.capabilities.multifd")),
            limit_seconds=settings["run.timeout"],
        )


# --- running ------------------------------------------------------------------------------------------------


def run(out: Path, scenarios: Sequence[str], qemus: Sequence[str], options: Sequence[str] = ()) -> None:
    """Run the scenarios, and the traced migration, with each QEMU; results are in `out`/QEMU.

    Args: options: more of `lab run`.
    Raises: SystemExit: one of them could not be run, or a move went wrong.
    """
    out = out.absolute()
    for qemu in qemus:
        which = ("--qemu", qemu, "--front-end", "vfio-pci", "--quiet")
        files = [f"{name}.toml" for name in scenarios]
        # Status 3: some devices do not keep to their profile. Two have no room for the device's own state.
        _vfu_dev("lab", "run", *files, *which, "--out", str(out / qemu), "--force", *options, also=EXIT_LESS)
        if "exact" in scenarios:
            folder = out / qemu / "exact-traced"
            said = folder.with_suffix(".json")
            said.unlink(missing_ok=True)
            # Status 1: it does not converge, which the table says.
            _vfu_dev("lab", "migrate", *TRACED, *which, "--out", str(folder), "--json", str(said), also=1)


def _vfu_dev(*words: str, also: int = 0) -> None:
    print("vfu-dev", *words, flush=True)
    folders = filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH")))
    # Here, because a scenario names a profile beside it.
    done = subprocess.run(
        [sys.executable, "-m", "vfu_dev", *words],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        check=False,
    )
    if done.returncode not in (0, also):
        sys.exit(f"exit status {done.returncode}: vfu-dev {' '.join(words)}")


def collect(out: Path, scenarios: Sequence[str], qemus: Sequence[str]) -> dict[str, Any]:
    """Return what the page needs of the results in `out`."""
    columns = []
    for qemu in qemus:
        summaries = {name: read_summary(out / qemu / name) for name in scenarios}
        points = [
            _point(name, point, summary["stood"].get(point["name"]))
            for name, summary in summaries.items()
            for point in summary["points"]
        ]
        first = summaries[scenarios[0]]
        column: dict[str, Any] = {"qemu": qemu, "version": first["versions"]["qemu"], "points": points}
        column["machine"] = first["points"][0]["machine"]
        if "exact" in scenarios:
            column["traced"] = traced(json.loads((out / qemu / "exact-traced.json").read_text()))
        columns.append(column)
    return {"kind": "profile-results", "version": 1, "columns": columns}


def _point(scenario: str, point: Mapping[str, Any], stood: str | None) -> dict[str, Any]:
    keys = ("p25", "p50", "p95", "n")
    downtime = point["metrics"].get("downtime_ms")
    return {
        "scenario": scenario,
        "variant": point["variant"],
        "settings": point["settings"],
        "statuses": point["statuses"],
        "downtime_ms": {key: downtime[key] for key in keys} if downtime else None,
        "stood": stood,
        "problems": point["problems"],
    }


def traced(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return how one migration asked for sizes, from QEMU's trace, and what its `query-migrate` said.

    Raises: ValueError: the trace has no questions.
    """
    events = report["qemu"]["trace_source"]
    found: dict[str, list[Mapping[str, Any]]] = {"pending-estimate": [], "pending-exact": []}
    for event in events:
        if event.get("kind") in found:
            found[event["kind"]].append(event)
    exact, estimates = found["pending-exact"], found["pending-estimate"]
    if len(exact) < 2 or not estimates:
        raise ValueError("QEMU's trace has no questions for sizes")
    active = [sample["qemu"] for sample in report["samples"] if sample["status"] == "active"]
    counted = [one for one in active if one["ram"].get("dirty-sync-count", 0) > 1]
    last = counted[-1]
    seen = {
        name: sorted({one[name] for one in counted if name in one})
        for name in ("remaining", "expected-downtime")
    }
    return {
        "status": report["status"],
        "seconds": exact[-1]["time"] - exact[0]["time"],
        "exact_questions": _asked(exact),
        "estimate_questions": _asked(estimates),
        "gap_seconds": (exact[-1]["time"] - exact[0]["time"]) / (_asked(exact) - 1),
        "estimate_bytes": _told(estimates),
        "exact_bytes": _told(exact),
        "estimate_event": {"event": estimates[-1]["event"], "text": estimates[-1]["text"]},
        "exact_event": {"event": exact[-1]["event"], "text": exact[-1]["text"]},
        "dirty_sync_count": last["ram"]["dirty-sync-count"],
        "total_ms": last["total-time"],
        "remaining_bytes": seen["remaining"],
        "expected_downtime_ms": seen["expected-downtime"],
    }


def _asked(events: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of events, with those that the lab left out because they were equal."""
    return sum(1 + one.get("repeated", 0) for one in events)


def _told(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return what these events had of the device. In an estimate of 10.x there is no size of STOP_COPY."""
    values = [one["values"] for one in events[1:]]  # 11.1's first comes before it asked
    return sorted({one["initial"] + one["dirty"] + one.get("stop_copy", 0) for one in values})


# --- the page -----------------------------------------------------------------------------------------------


def render(results: Mapping[str, Any]) -> str:
    """Return the generated part of the page."""
    columns = results["columns"]
    parts = (_machine(columns), _main_table(columns), _ratio_table(columns), _traced_part(columns))
    return "\n\n".join(parts) + "\n"


def _machine(columns: Sequence[Mapping[str, Any]]) -> str:
    machine = columns[0]["machine"]
    loads = ", ".join(f"{column['machine']['load_average'][0]:.1f}" for column in columns)
    versions = "; ".join(f"**{_short(column)}** is {column['version']}" for column in columns)
    return (
        f"{versions}. {machine['processor']}, {machine['cores']} cores; load average when each QEMU's runs "
        f"began: {loads}. Completed moves of a cell: {_counts(columns)}."
    )


def _counts(columns: Sequence[Mapping[str, Any]]) -> str:
    counts = {one["downtime_ms"]["n"] for column in columns for one in column["points"] if one["downtime_ms"]}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _short(column: Mapping[str, Any]) -> str:
    return ".".join(str(column["version"]).split()[0].split(".")[:2])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(head), "|" + "---|" * len(head), *map(_row, rows)])


def _main_table(columns: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for number, point in enumerate(columns[0]["points"]):
        same = [column["points"][number] for column in columns]
        assert {(one["scenario"], one["variant"]) for one in same} == {(point["scenario"], point["variant"])}
        settings = point["settings"]
        replayed = Replayed.of(settings)
        predicted = replayed.predict(settings)
        published = PUBLISHED.get((point["scenario"], point["variant"]))
        rows.append(
            [
                f"`{replayed.profile.name}`" + (f" / {replayed.scale}" if replayed.scale > 1 else ""),
                _how(settings),
                *map(_outcome, same),
                "never" if predicted.downtime_seconds is None else f"{predicted.downtime_seconds * 1000:.0f}",
                "-" if published is None else str(published),
            ]
        )
    head = ["Profile", "Move", *map(_short, columns), "Predicted", "Published"]
    return _table(head, rows)


def _how(settings: Mapping[str, Any]) -> str:
    """Return what differs from QEMU's defaults."""
    words = []
    if settings["device.devices"] > 1:
        words.append(f"{settings['device.devices']} devices")
    if settings["qemu.switchover-ack"]:
        words.append("ack")
    if settings.get("qemu.capabilities.multifd"):
        words.append(f"multifd {settings['qemu.parameters.multifd-channels']}")
    limit = settings["qemu.downtime-limit"]
    if limit != DOWNTIME_LIMIT_SECONDS * 1000:
        words.append(f"limit {limit} ms")
    if settings["qemu.max-bandwidth"] != MAX_BANDWIDTH:
        most = settings["qemu.max-bandwidth"]
        words.append(f"max {format_size(most)}/s" if most else "max none")
    if avail := settings["qemu.avail-switchover-bandwidth"]:
        words.append(f"avail {format_size(avail)}/s")
    return ", ".join(words) or "defaults"


def _outcome(point: Mapping[str, Any]) -> str:
    if point["problems"]:
        return "PROBLEM: " + "; ".join(point["problems"])
    done, moves = point["statuses"].get("completed", 0), sum(point["statuses"].values())
    if not done:
        return f"never ({point['settings']['run.timeout']:g} s)"
    figures = point["downtime_ms"]
    some = f", {done} of {moves}" if done < moves else ""
    return f"{figures['p25']:.0f} / {figures['p50']:.0f} / {figures['p95']:.0f}{some}"


def _ratio_table(columns: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for scenario, upper, lower, published in RATIOS:
        cells = [_ratio(column, scenario, upper, lower) for column in columns]
        predicted = _predicted_ratio(columns[0], scenario, upper, lower)
        rows.append([f"`{scenario}`: {upper} / {lower}", *cells, predicted, published])
    return _table(["Downtimes", *map(_short, columns), "Predicted", "Published"], rows)


def _find(column: Mapping[str, Any], scenario: str, variant: str) -> Mapping[str, Any]:
    (point,) = [one for one in column["points"] if (one["scenario"], one["variant"]) == (scenario, variant)]
    return dict(point)


def _ratio(column: Mapping[str, Any], scenario: str, upper: str, lower: str) -> str:
    figures = [_find(column, scenario, variant)["downtime_ms"] for variant in (upper, lower)]
    return "-" if None in figures else f"{figures[0]['p50'] / figures[1]['p50']:.2f}"


def _predicted_ratio(column: Mapping[str, Any], scenario: str, upper: str, lower: str) -> str:
    settings = [_find(column, scenario, variant)["settings"] for variant in (upper, lower)]
    first, second = (Replayed.of(one).predict(one).downtime_seconds for one in settings)
    return f"{first / second:.2f}" if first and second else "-"


def _traced_part(columns: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for column in columns:
        found = column["traced"]
        rows.append(
            [
                _short(column),
                f"{found['exact_questions']} in {found['seconds']:.1f} s",
                f"{found['gap_seconds'] * 1000:.2f} ms",
                _span(found["estimate_bytes"]),
                _span(found["exact_bytes"]),
                f"{found['dirty_sync_count']} in {found['total_ms'] / 1000:.1f} s",
                _span(found["remaining_bytes"]),
                f"{_span(found['expected_downtime_ms'])} ms",
            ]
        )
    head = ["QEMU", "Exact size asked", "Each (mean)", "Estimate", "Exact", "dirty-sync-count", "remaining"]
    table = _table([*head, "expected-downtime"], rows)
    events = [
        f"    {_short(column)}: {one['event']} {one['text']}"
        for column in columns
        for one in (column["traced"]["estimate_event"], column["traced"]["exact_event"])
    ]
    return table + "\n\nOne estimate, and the exact answer to it, in each trace:\n\n" + "\n".join(events)


def _span(values: Sequence[int]) -> str:
    if not values:
        return "not told"
    low, high = (f"{value:,}".replace(",", " ") for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def with_results(document: str, results: Mapping[str, Any]) -> str:
    """Return `document`, the page, with its generated part renewed."""
    return renewed(document, COMMAND, render(results))


def main(words: Sequence[str]) -> None:
    """See the module."""
    page = PAGE
    if words[:1] == ["run"]:
        out = Path(words[1])
        run(out, SCENARIOS, QEMUS, words[2:])
        collected = anonymous(collect(out, SCENARIOS, QEMUS), {})
        RESULTS.write_text(json.dumps(collected, indent=1) + "\n")
    elif words:
        page = Path(words[0])
    page.write_text(with_results(page.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
