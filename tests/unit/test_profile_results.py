"""docs/profile-results.md is what its stored results say, of every shipped profile and three QEMUs."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vfu_dev.migration.forecast import OVERHEAD_SECONDS
from vfu_dev.profile import read_profile
from vfu_dev.profile.shipped import profile_path, shipped
from vfu_dev.replay.predict import predict_replay
from vfu_dev.replay.scale import scaled
from vfu_dev.series.prediction import annotation
from vfu_dev.series.scenario import read_scenario

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "profile-results"))

import collect  # noqa: E402

RESULTS: dict[str, Any] = json.loads(collect.RESULTS.read_text())
COLUMNS = RESULTS["columns"]


def test_the_page_is_the_results() -> None:
    page = collect.PAGE.read_text()
    assert collect.with_results(page, RESULTS) == page, f"{collect.COMMAND} docs/profile-results.md"
    changed = copy.deepcopy(RESULTS)
    changed["columns"][0]["points"][0]["downtime_ms"]["p50"] += 1
    assert collect.with_results(page, changed) != page


def test_three_releases_were_run() -> None:
    assert [column["qemu"] for column in COLUMNS] == list(collect.QEMUS)
    versions = [column["version"].split(".")[:2] for column in COLUMNS]
    assert versions == [["10", "0"], ["10", "2"], ["11", "1"]]


def test_each_point_of_the_scenarios_has_a_result_and_each_profile_a_row() -> None:
    """Of the files as they are now; no move went wrong."""
    points = [
        (name, point)
        for name in collect.SCENARIOS
        for point in read_scenario(collect.HERE / f"{name}.toml").points
    ]
    replayed = {Path(point["device.profile"]).stem for _, point in points}
    assert set(shipped()) <= replayed
    for column in COLUMNS:
        assert [(one["scenario"], one["variant"]) for one in column["points"]] == [
            (name, point.variant) for name, point in points
        ]
        for one, (_, point) in zip(column["points"], points, strict=True):
            now = point.to_dict()["settings"]
            assert {**one["settings"], "run.moves": 0} == {**now, "run.moves": 0}
            assert one["problems"] == []
            assert set(one["statuses"]) <= {"completed", "not-converged"}


def test_qemu_and_the_predictions_agree_about_convergence() -> None:
    for column in COLUMNS:
        for point in column["points"]:
            predicted = collect.Replayed.of(point["settings"]).predict(point["settings"])
            converged = point["statuses"].get("completed", 0) > 0
            assert converged == predicted.converges, (column["qemu"], point["scenario"], point["variant"])
            if converged:
                # The machine's and QEMU's own work come on top. Loading may begin some turns before the stop.
                assert predicted.downtime_seconds is not None
                own = OVERHEAD_SECONDS * point["settings"]["device.devices"]
                assert point["downtime_ms"]["p50"] >= 1000 * (predicted.downtime_seconds - own) * 0.85


def test_the_traces_say_what_the_page_says_of_11_1() -> None:
    """All ask again and again; only 11.1's estimate and `query-migrate` know of the size."""
    size = read_profile(profile_path("exact-21gb")).stop_copy.bytes
    assert size is not None
    for column in COLUMNS:
        found, new = column["traced"], column["version"].startswith("11.1")
        assert found["exact_bytes"] == [size.value]
        assert found["estimate_bytes"] == [size.value if new else 0]
        # RAM is in it as well.
        assert min(found["remaining_bytes"]) >= size.value if new else found["remaining_bytes"] == []
        assert (max(found["expected_downtime_ms"]) > 60_000) == new
        assert found["exact_questions"] > 10 * found["seconds"]
        assert found["dirty_sync_count"] > 10


def test_predictions_of_published_figures() -> None:
    """Within a tenth of what was published: so the profiles were set."""
    for (scenario, variant), published in collect.PUBLISHED.items():
        points = read_scenario(collect.HERE / f"{scenario}.toml").points
        (point,) = [point for point in points if point.variant == variant]
        predicted = collect.Replayed.of(point.settings).predict(point.settings)
        assert predicted.downtime_seconds is not None
        assert 1000 * predicted.downtime_seconds == pytest.approx(published, rel=0.11)
        assert annotation(point, []) == {}, "the model of loads does not cover a profile"


def test_a_prediction_follows_the_profile() -> None:
    """The link of a vGPU, and the ack that waits for the initial data to be loaded."""
    vgpu = scaled(read_profile(profile_path("vgpu-24gib")), 64)
    slow, fast = (predict_replay(vgpu, 0.3 * rate, rate) for rate in (20 << 20, 400 << 20))
    assert (slow.converges, fast.converges) == (False, True)
    assert slow.left_bytes > slow.threshold_bytes
    assert fast.left_bytes <= fast.threshold_bytes
    mlx5 = read_profile(profile_path("mlx5-300mb"))
    off, on = (predict_replay(mlx5, 1e9, switchover_ack=ack) for ack in (False, True))
    assert off.downtime_seconds is not None
    assert on.downtime_seconds is not None
    assert off.downtime_seconds - on.downtime_seconds == pytest.approx(1.48)
    assert on.stop_seconds >= 1.48 > off.stop_seconds
    assert not predict_replay(mlx5, 299_999_999.0, limit_seconds=1).converges
