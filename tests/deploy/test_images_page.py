"""docs/images.md: its commands, up to what they name; apt-get, make, podman and kubectl are stand-ins."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from pagekit import ROOT, run_script
from podkit import Container, build, containers_work, manifest
from serverkit import PATIENCE_SECONDS

from vfu_dev.cli.lab import migrate

PAGE = (ROOT / "docs/images.md").read_text()
TOOLS = ("apt-get", "make", "podman", "kubectl")


def load_images() -> ModuleType:
    """Return the program behind `make images`."""
    spec = importlib.util.spec_from_file_location("images", ROOT / "deploy/container/images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


IMAGES = load_images()
USER = 64246

# The checkout's copy that the page's commands ran in, and each call of a tool.
Calls = tuple[Path, list[list[str]]]


def script() -> str:
    """Return the page's commands: its blocks, then those within a sentence."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`((?:make|podman)\s[^`]+)`", PAGE)]
    # `podman run` alone is a name there, no command.
    return "\n".join([*blocks, *(line for line in inline if len(line.split()) > 2)])


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """Run the page's commands."""
    folder = tmp_path_factory.mktemp("images")
    checkout, tools, calls = folder / "checkout", folder / "bin", folder / "calls"
    shutil.copytree(
        ROOT / "deploy", checkout / "deploy", ignore=shutil.ignore_patterns("*.pub", "id", "host_key")
    )
    tools.mkdir()
    for name in TOOLS:
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "" >>{calls}\n')
        (tools / name).chmod(0o755)
    run_script(f"PATH={tools}:$PATH\n{script()}", folder, checkout, PATIENCE_SECONDS)
    return checkout, [call.split("\n") for call in calls.read_text().strip().split("\n\n")]


def calls_of(called: Calls, *words: str) -> list[list[str]]:
    """Return what follows `words` in each call that begins with them."""
    found = [call[len(words) :] for call in called[1] if call[: len(words)] == list(words)]
    assert found, f"the page does not call {' '.join(words)}"
    return found


def test_the_tools_that_the_page_installs_are_those_of_the_tests(called: Calls) -> None:
    (packages,) = calls_of(called, "apt-get", "install", "-y")
    assert set(packages) <= set((ROOT / "tests/packages.txt").read_text().splitlines())


def test_make_hands_its_options_on(called: Calls) -> None:
    """The Makefile's last command, as make would run it, is one that images.py parses."""
    isolations = []
    for arguments in calls_of(called, "make"):
        said = subprocess.run(
            ["make", "-n", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        )
        (line,) = (line for line in said.stdout.splitlines() if "images.py" in line)
        _, program, *words = shlex.split(line)
        assert (ROOT / program).samefile(str(IMAGES.__file__))
        given = IMAGES.command_line().parse_args(words)
        assert given.names == []
        isolations.append(given.isolation)
    assert isolations == ["", "chroot"]


def test_podman_builds_the_image_of_that_name(called: Calls) -> None:
    for option, file, tag, name, context in calls_of(called, "podman", "build"):
        assert (option, tag, context) == ("-f", "-t", ".")
        assert (called[0] / file).samefile(called[0] / "deploy/container" / IMAGES.IMAGES[name])


def test_a_move_in_a_container_leaves_its_report_outside(called: Calls) -> None:
    """The folder is there, as podman demands; `lab migrate` runs, and its --out is the mounted place."""
    qemus = []
    for rm, option, volume, image, *arguments in calls_of(called, "podman", "run"):
        assert (rm, option) == ("--rm", "-v")
        here, place, ownership = volume.split(":")
        assert here == str(called[0] / "report")
        assert Path(here).is_dir()
        assert ownership == "U"  # the image's user writes there
        program, lab, name, *rest = command_line(image, arguments)
        assert [program, lab, name] == ["vfu-dev", "lab", "migrate"]
        given = migrate.make_context(name, rest).params
        assert given["out"] == Path(place)
        qemus.append(given["qemu"])
    assert qemus == [None, "bookworm-backports"]


def command_line(image: str, arguments: list[str]) -> list[str]:
    """Return what an image runs with `arguments`, or without any by itself."""
    text = (ROOT / "deploy/container" / IMAGES.IMAGES[image]).read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    (by_itself,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    return [*json.loads(entry), *(arguments or json.loads(by_itself))]


@pytest.mark.images
def test_the_moves_in_one_container(called: Calls, tmp_path: Path) -> None:
    """The page's two `podman run`, by buildah: whole moves by the QEMUs it says, their reports outside."""
    assert containers_work(), "apt-get install buildah crun"
    build("vfu-dev-lab")
    said = []
    for number, (_, _, volume, image, *arguments) in enumerate(calls_of(called, "podman", "run")):
        report = tmp_path / str(number)
        report.mkdir()
        os.chown(report, USER, USER)
        with Container(image) as container:
            argv = container.argv(command_line(image, arguments), [], {}, {volume.split(":")[1]: report})
            done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
        assert done.returncode in (0, 3), done.stderr  # 3: this machine is too busy for the load
        figures = json.loads((report / "report.json").read_text())
        assert figures["status"] == "completed"
        assert figures["guest"]["verified"] is True
        assert figures["devices"][0]["digest_match"]
        assert "<svg" in (report / "report.html").read_text()
        said.append((figures["qemu"]["front_end"], figures["qemu"]["source"]["version"][:5]))
    assert said == [("vfio-user-pci", "10.2."), ("vfio-pci", "10.0.")]


def test_what_kubectl_is_given_is_there(called: Calls) -> None:
    """With the keys that the page makes before, and the job of that name."""
    ((folder,),) = calls_of(called, "kubectl", "apply", "-k")
    pair = manifest(called[0] / folder / "kustomization.yaml")
    files = [*pair["resources"], *(file for one in pair["secretGenerator"] for file in one["files"])]
    missing = [name for name in files if not (called[0] / folder / name).is_file()]
    assert missing == []
    made = [manifest(called[0] / folder / name) for name in pair["resources"]]
    ((followed,),) = calls_of(called, "kubectl", "logs", "-f")
    assert followed in {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in made}
