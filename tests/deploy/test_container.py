"""Container file and compose file: hadolint, the compose specification, and options that the server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml
from promkit import DEPLOY
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds.packages import GROUPS
from vfu_dev.cli.serve import command as serve_command

CONTAINER = DEPLOY / "container"
CONTAINERFILE = CONTAINER / "Containerfile"
LAB = CONTAINER / "Containerfile.lab"


def tool(name: str) -> str:
    """Return a program that pip installed beside this Python, or the machine's."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is not installed: pip install -e '.[test]'"
    return found


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONTAINER / "compose.yaml").read_text())
    return loaded


def options(arguments: list[str]) -> dict[str, str]:
    """Return option -> value, for options the server has; any other fails."""
    context = serve_command.make_context("serve", list(arguments))
    return {name: str(value) for name, value in context.params.items()}


def image_arguments() -> tuple[list[str], list[str]]:
    """Return ENTRYPOINT and CMD of the image."""
    text = CONTAINERFILE.read_text().replace("\\\n", "")
    entry, arguments = (
        re.search(rf"^{name} (\[.*\])$", text, re.MULTILINE) for name in ("ENTRYPOINT", "CMD")
    )
    assert entry is not None
    assert arguments is not None
    return json.loads(entry[1]), json.loads(arguments[1])


def hadolint(file: Path) -> str:
    command: list[str | Path] = [tool("hadolint"), "--no-color", "--failure-threshold", "style", file]
    done = subprocess.run(command, timeout=PATIENCE_SECONDS, check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("file", [CONTAINERFILE, LAB], ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    assert hadolint(file) == ""


def test_hadolint_would_notice(tmp_path: Path) -> None:
    file = tmp_path / "Containerfile"
    file.write_text(
        CONTAINERFILE.read_text().replace("debian:12-slim", "debian").replace("USER 64246", "USSER 1")
    )
    assert "DL3006" in hadolint(file) or "unexpected" in hadolint(file)


def test_the_image_has_what_a_build_needs() -> None:
    """The packages that what is built asks for are those that the first stage installs."""
    text = CONTAINERFILE.read_text().partition("\nFROM debian:12-slim\n")[0]
    for need in (*GROUPS["libvfio-user"], *GROUPS["vfu-kernels"]):
        assert re.search(rf"\s{re.escape(need.package)}\s", text), need.package


def test_the_images_copy_what_exists() -> None:
    """Each COPY and each exception of the ignore file names something in the checkout."""
    top = DEPLOY.parent
    copied = {
        name
        for file in (CONTAINERFILE, LAB)
        for line in re.findall(r"^COPY (?!--)(.*)$", file.read_text(), re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert copied == set(context())
    assert all((top / name).exists() for name in copied)


def context() -> list[str]:
    """Return what the ignore file lets into the image's build."""
    lines = (CONTAINER / "Containerfile.dockerignore").read_text().splitlines()
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_what_is_copied_installs(tmp_path: Path) -> None:
    """pip makes a wheel of it, with the hooks that pyproject.toml names."""
    for name in context():
        source, target = DEPLOY.parent / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    done = subprocess.run(
        command, cwd=tmp_path, timeout=PATIENCE_SECONDS, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("dist/*.whl"))


def test_the_images_command_is_one_of_ours() -> None:
    entry, arguments = image_arguments()
    assert entry[:2] == ["vfu-dev", "serve"]
    given = options([*entry[2:], *arguments])
    text = CONTAINERFILE.read_text()
    assert f"EXPOSE {given['metrics_port']}" in text
    assert f":{given['metrics_port']}/metrics" in text


def test_compose_is_of_the_specification() -> None:
    spec = compose_spec.PyCompose.from_json(json.dumps(compose()))
    spec.validate()
    assert set(spec.service_names()) == {"source", "destination", "prometheus", "grafana"}


@pytest.mark.parametrize("damage", [("mem_limit", "mem_limt"), ("stop_grace_period", "stop_gracefully")])
def test_the_specification_would_notice(damage: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="does not start with"):
        compose_spec.PyCompose.from_json(json.dumps(compose()).replace(*damage))


def test_compose_mounts_what_exists() -> None:
    text = compose()
    for service in text["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (CONTAINER / source).resolve().exists(), source
            else:
                assert source in text["volumes"]
        assert set(service.get("depends_on", ())) <= set(text["services"])


def test_compose_starts_servers_that_prometheus_finds() -> None:
    entry, _ = image_arguments()
    services = compose()["services"]
    targets = yaml.safe_load((CONTAINER / "targets/devices.yml").read_text())[0]["targets"]
    ports = {}
    for name in ("source", "destination"):
        given = options([*entry[2:], *services[name]["command"]])
        assert given["name"] == name
        ports[name] = given["metrics_port"]
    assert sorted(targets) == sorted(f"{name}:{port}" for name, port in ports.items())


def test_ports_are_of_this_machine_only() -> None:
    for service in compose()["services"].values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")
