"""Prometheus and kubectl for tests: programs of Debian's packages, unpacked in the cache; a server."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from serverkit import PATIENCE_SECONDS, wait_until

from vfu_dev.bench.peers import free_port
from vfu_dev.builds import BuildError, Cache, Recipe, apt
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.making import build

DEPLOY = Path(__file__).parents[1] / "deploy"


def _recipe(package: str, programs: tuple[str, ...]) -> Recipe:
    """Return the recipe of some programs of a Debian package."""

    def inputs() -> dict[str, object]:
        release = platform.freedesktop_os_release()
        return {"package": package, "release": f"{release.get('ID')} {release.get('VERSION_ID', '')}"}

    def make(context: BuildContext, out: Path) -> dict[str, object]:
        """Unpack the package. Installing Prometheus would start a daemon on this machine."""
        if not apt.available():
            raise BuildError(f"there is neither {programs[0]} nor an apt to fetch it with ({package})")
        private = apt.PrivateApt(context.cache.root / "apt" / "machine")
        private.update(context, "fetch package lists")
        private.download(context, [package], out)
        (file,) = out.glob("*.deb")
        root = out / "root"
        context.run(["dpkg-deb", "-x", file, root], title=f"unpack {package}", cwd=out)
        for program in programs:
            shutil.move(root / "usr/bin" / program, out / program)
        shutil.rmtree(root)
        file.unlink()
        return {"package": file.name}

    return Recipe(
        name=package, summary=f"{' and '.join(programs)} for tests", product="", inputs=inputs, make=make
    )


PACKAGES = {"prometheus": ("prometheus", "promtool"), "kubernetes-client": ("kubectl",)}


def program(name: str, *, own: bool = True) -> Path:
    """Return a program of PACKAGES: the machine's, if `own`, else Debian's. Raises: BuildError: neither."""
    if own and (found := shutil.which(name)):
        return Path(found)
    (package,) = (package for package, programs in PACKAGES.items() if name in programs)
    return build(_recipe(package, PACKAGES[package]), Cache()).path / name


def _write_limits(home: Path, limits: dict[str, float]) -> None:
    file = home / "rules" / "limits.yml"
    rules = yaml.safe_load(file.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if rule["record"] in limits:
                rule["expr"] = f"vector({limits[rule['record']]!r})"
    file.write_text(yaml.safe_dump(rules))


@dataclass
class Prometheus:
    """A Prometheus on a loopback port, with the rules of deploy/, in a folder of its own."""

    folder: Path
    url: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path, *, interval: str, limits: dict[str, float], hold: str) -> Prometheus:
        """Start it on a copy of deploy/prometheus.

        Args:
            folder: takes the copy, the data and the log.
            interval: of scrapes and rules, instead of the one second there.
            limits: record in limits.yml -> value instead of the one there.
            hold: every alert's `for` that is longer is cut to this.
        """
        home = folder / "prometheus"
        shutil.copytree(DEPLOY / "prometheus", home)
        (home / "targets/example.yml").unlink()
        config = yaml.safe_load((home / "prometheus.yml").read_text())
        config["global"] |= dict.fromkeys(
            ("scrape_interval", "scrape_timeout", "evaluation_interval"), interval
        )
        for job in config["scrape_configs"]:
            for discovery in job["file_sd_configs"]:
                discovery["refresh_interval"] = "1s"
        (home / "prometheus.yml").write_text(yaml.safe_dump(config))
        for file in (home / "rules").iterdir():
            rules = yaml.safe_load(file.read_text())
            for group in rules["groups"]:
                for rule in group["rules"]:
                    if "for" in rule:
                        rule["for"] = hold
            file.write_text(yaml.safe_dump(rules))
        _write_limits(home, limits)
        address = f"127.0.0.1:{free_port()}"
        command: list[str | Path] = [
            program("prometheus"),
            f"--config.file={home / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home)
        server = cls(folder, f"http://{address}", process)
        wait_until(server._ready, "Prometheus is ready")
        return server

    def set_limits(self, limits: dict[str, float]) -> None:
        """Have it judge by other numbers from now on; see `start`."""
        _write_limits(self.folder / "prometheus", limits)
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._judges_by(limits), "the new limits are in force")

    def _judges_by(self, limits: dict[str, float]) -> bool:
        found = {name: self.query(name) for name in limits}
        return all(bool(one) and float(one[0]["value"][1]) == limits[name] for name, one in found.items())

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=PATIENCE_SECONDS) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def log(self) -> str:
        """Return what it wrote."""
        return (self.folder / "prometheus.log").read_text(errors="replace")

    def add_target(self, name: str, port: int) -> None:
        """Put a device into the folder that Prometheus looks into; no reload is needed."""
        file = self.folder / "prometheus/targets" / f"{name}.yml"
        file.write_text(yaml.safe_dump([{"targets": [f"127.0.0.1:{port}"], "labels": {"host": "test"}}]))

    def api(self, path: str, **parameters: object) -> Any:
        """Return the data of an answer of the HTTP API; one that is an error fails, with its text."""
        data = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}", data, timeout=PATIENCE_SECONDS) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return what an expression gives now: a list of {"metric": labels, "value": [time, text]}."""
        return list(self.api("query", query=expr)["result"])

    def query_range(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        """Return what an expression gave between two times, in steps of 0.2 s, as Grafana asks for it."""
        return list(self.api("query_range", query=expr, start=start, end=end, step=0.2)["result"])

    def firing(self) -> set[tuple[str, str]]:
        """Return (alert, device) of what fires now, or (alert, instance) where no device is known."""
        return {
            (alert["labels"]["alertname"], alert["labels"].get("device", alert["labels"]["instance"]))
            for alert in self.api("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def stop(self) -> None:
        """Stop it."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
