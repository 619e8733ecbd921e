"""Draws Grafana's dashboard without Grafana's server: docs/img/dashboard.png, by hand, not in CI.

    python tests/deploy/preview/make_preview.py [FOLDER]

The server is in no registry that the tests may use, its libraries are: panels are drawn by @grafana/ui, from
what a real Prometheus answers about the scenario of tests/deploy/test_live.py. FOLDER keeps what npm brings,
600 MB.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "deploy")]

import test_live  # noqa: E402
from expressions import dashboard, substituted  # noqa: E402
from promkit import Prometheus  # noqa: E402
from serverkit import short_folder  # noqa: E402

from vfu_dev.builds import artifact  # noqa: E402


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


PICTURE = ROOT / "docs" / "img" / "dashboard.png"
BUNDLE = ["--bundle", "--define:process.env.NODE_ENV='production'", "--define:global=window"]
LOADERS = [f"--loader:.{kind}=dataurl" for kind in ("svg", "png", "ttf")]


def named(template: str, metric: dict[str, str]) -> str:
    """Return a legend as Grafana writes it."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: metric.get(match[1], ""), template)


def answers(scenario: test_live.Scenario) -> dict[str, Any]:
    """Return every panel with what Prometheus has for it; figures of the moment are of the end."""
    panels = []
    for panel in dashboard()["panels"]:
        series = []
        for target in panel.get("targets", ()):
            start = scenario.end - 1 if target.get("instant") else scenario.start
            expr = substituted(target["expr"])
            for one in scenario.prometheus.query_range(expr, start, scenario.end):
                name = named(target["legendFormat"], one["metric"])
                series.append({"name": name, "metric": one["metric"], "values": one["values"]})
        panels.append({"panel": panel, "series": series})
    return {"start": scenario.start, "end": scenario.end, "panels": panels}


def play() -> dict[str, Any]:
    """Have the scenario of the tests happen, and return its panels."""
    with short_folder() as folder:
        prometheus = Prometheus.start(
            folder, interval=test_live.INTERVAL, limits=test_live.NO_LIMITS, hold=test_live.HOLD
        )
        try:
            library = artifact("libvfio-user", build=True)
            with test_live.servers(library, folder, prometheus) as running:
                return answers(test_live.play(prometheus, running))
        finally:
            prometheus.stop()


def draw(folder: Path, data: dict[str, Any]) -> None:
    """Bundle the page and take its picture."""
    for name in ("package.json", "preview.jsx", "preview.html"):
        shutil.copy(HERE / name, folder)
    (folder / "data.json").write_text(json.dumps(data))
    npm = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
    subprocess.run(npm, cwd=folder, check=True)
    esbuild = [
        "npx",
        "esbuild",
        "preview.jsx",
        "--outfile=preview.js",
        "--log-level=error",
        *BUNDLE,
        *LOADERS,
    ]
    subprocess.run(esbuild, cwd=folder, check=True)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/preview.html"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=8000",
        ]
        size = f"--window-size=1516,{max_row(data) * 36 + 16}"
        command = ["chromium", *options, size, f"--screenshot={PICTURE}", address]
        subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)
        server.shutdown()


def max_row(data: dict[str, Any]) -> int:
    """Return where the last panel ends, in rows of the grid."""
    places = [one["panel"]["gridPos"] for one in data["panels"]]
    return max(place["y"] + place["h"] for place in places)


def main() -> None:
    """Make the picture."""
    data = play()
    if sys.argv[1:]:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder, data)
    else:
        with tempfile.TemporaryDirectory() as name:
            draw(Path(name), data)


if __name__ == "__main__":
    main()
