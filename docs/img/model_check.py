"""The model beside what `vfu-dev migrate`'s migrator measured: model-check.json and model-check.png.

Two servers, a load made by the source's own engine, a link limited to 16 MiB/s. With the project installed
and libvfio-user built, from the repository: `python docs/img/model_check.py`. It takes six minutes on a
machine that has nothing else to do; `--draw` draws what was measured before.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfu_dev.builds import artifact
from vfu_dev.client import VfioUserDevice
from vfu_dev.client.migrator import ClientOptions, MigrationError, Migrator
from vfu_dev.model.link import migrator_link
from vfu_dev.model.predict import predict
from vfu_dev.report.convergence_map import against_figure
from vfu_dev.report.drawing import write_png
from vfu_dev.vm.servers import DeviceServer, ServerOptions, served
from vfu_dev.workload import Workload

HERE = Path(__file__).parent
MIB = 1 << 20
MEMORY, BANDWIDTH, LIMIT_SECONDS, TIMEOUT_SECONDS = 32 * MIB, 16 * MIB, 0.1, 12.0
PATTERNS = ("uniform", "sequential", "hotset", "zipf")
# Pages written a second, as a share of what the link carries.
TRIES = 3
RATIOS = (0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9, 0.95, 1.05, 1.2, 1.5, 2.0)


def measure(source: DeviceServer, destination: DeviceServer, load: Workload) -> dict[str, Any]:
    """Migrate once; returns what the model says and what it was, as pairs."""
    link = migrator_link(BANDWIDTH, downtime_limit_seconds=LIMIT_SECONDS, overhead_seconds=0.002)
    said = predict(load, MEMORY // 4096, link, limit_seconds=TIMEOUT_SECONDS)
    with source.open_control() as control:
        control.command("load", load=load.to_dict())
        while control.status()["connected"]:
            time.sleep(0.01)
        with (
            VfioUserDevice.connect(source.socket) as one,
            VfioUserDevice.connect(destination.socket) as other,
        ):
            options = ClientOptions(LIMIT_SECONDS, BANDWIDTH, None, TIMEOUT_SECONDS, resume_source=True)
            migrator = Migrator(one, other, options)
            try:
                migrator.run()
                converged = True
            except MigrationError:
                converged = False
        saved = control.status()["save"]
        keeps_up = control.command("load-status")["keeps_up"]
    moved = saved["precopy_bytes"] + saved["stop_copy_bytes"]
    return {
        "pattern": load.pattern,
        "ratio": round(load.page_rate * 4096 / BANDWIDTH, 3),
        "converged": [said.converges, converged],
        "seconds": [said.total_seconds, migrator.progress.total_seconds],
        "bytes": [said.total_bytes, moved],
        "passes": [said.passes, saved["passes"]],
        "downtime_ms": [said.downtime_seconds * 1000, migrator.progress.downtime_seconds * 1000],
        "left_bytes": [said.left_bytes, saved["stop_copy_bytes"] or migrator.progress.remaining_bytes],
        "load_reached": keeps_up,
        # On a machine that has other things to do the link is not the link.
        "link_reached": round(moved / migrator.progress.total_seconds / BANDWIDTH, 3),
    }


def main() -> None:
    """Measure, write the figures and draw them."""
    rows = []
    options = ServerOptions(memory_bytes=MEMORY, library=artifact("libvfio-user"))
    with served([("source", replace(options, fill=7)), ("destination", options)]) as (source, destination):
        for pattern in PATTERNS:
            for ratio in RATIOS:
                load = Workload(pattern, rate_pages=ratio * BANDWIDTH / 4096)
                tries: list[dict[str, Any]] = []
                while len(tries) < TRIES and (not tries or tries[-1]["link_reached"] < 0.97):
                    tries.append(measure(source, destination, load))
                rows.append(max(tries, key=lambda row: row["link_reached"]))
                print(json.dumps(rows[-1]), flush=True)
    (HERE / "model-check.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the moves that both say converge."""
    write_png(against_figure([row for row in rows if all(row["converged"])]), HERE / "model-check.png")


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw(json.loads((HERE / "model-check.json").read_text()))
    else:
        main()
