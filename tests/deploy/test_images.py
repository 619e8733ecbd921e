"""The images: the server's serves; with the lab's, the pod pair of kubernetes/migrate migrates."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from podkit import Container, Pods, build, containers_work, manifest
from promkit import DEPLOY
from serverkit import PATIENCE_SECONDS
from test_container import hadolint

from vfu_dev.client import ControlClient, VfioUserDevice
from vfu_dev.vm.namespaces import Namespaces

MIGRATE = DEPLOY / "kubernetes/migrate"
GROUP = 64246


def test_the_servers_image_serves(short_tmp: Path) -> None:
    """By its entry point, as a user without rights: the socket is the group's, and the device answers on it.

    Where buildah cannot enter a root at all, hadolint is what remains, with a warning.
    """
    if not containers_work():
        warnings.warn("buildah does not work here: the image was not built", stacklevel=1)
        assert hadolint(DEPLOY / "container/Containerfile") == ""
        return
    build("vfu-dev")
    short_tmp.chmod(0o777)
    log = short_tmp / "log"
    # The port of its metrics would be this machine's without a network of its own.
    with Namespaces("net", "mount") as network, Container("vfu-dev") as container, log.open("w") as errors:
        arguments = ["--socket", "/run/vfu-dev/s", "--memory", "1M"]
        argv = container.argv(None, arguments, {}, {"/run/vfu-dev": short_tmp})
        with subprocess.Popen(
            network.enter(argv), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline().startswith("serving "), log.read_text()
                assert (short_tmp / "s").stat().st_gid == GROUP
                with VfioUserDevice.connect(short_tmp / "s") as device:
                    device.region_write(2, 0, b"from outside")
                    assert device.region_read(2, 0, 12) == b"from outside"
                with ControlClient(short_tmp / "s.ctl") as control:
                    assert control.command("status")["state"] == "RUNNING"
                    control.command("quit")
                process.communicate(timeout=PATIENCE_SECONDS)
                assert process.returncode == 0, log.read_text()
            finally:
                process.terminate()


@pytest.mark.images
def test_the_pod_pair_migrates(tmp_path: Path) -> None:
    """What the manifests say, with the images: keys, users, volumes, commands. The move verifies itself."""
    assert containers_work(), "apt-get install buildah crun"
    build("vfu-dev-lab")
    folder = tmp_path / "migrate"
    shutil.copytree(MIGRATE, folder)
    subprocess.run([folder / "ssh/keys.sh"], check=True)
    destination = manifest(folder / "destination.yaml")["spec"]
    source = manifest(folder / "source.yaml")["spec"]["template"]["spec"]
    with Pods(folder, manifest(folder / "service.yaml")["metadata"]["name"]) as pods:
        (sshd,) = destination["containers"]
        pods.start(1, sshd, pods.volumes(destination))
        volumes = pods.volumes(source)
        (wait,), (move,) = source["initContainers"], source["containers"]
        waiting = pods.start(0, wait, volumes)
        _, said = waiting.communicate(timeout=PATIENCE_SECONDS)
        assert waiting.returncode == 0, said
        moving = pods.start(0, move, volumes)
        out, said = moving.communicate(timeout=PATIENCE_SECONDS)
        assert moving.returncode in (0, 3), said  # 3: this machine is too busy for the load
        figures = json.loads(out)
        assert figures["guest"]["verified"] is True
        assert figures["status"] == "completed"
        assert (volumes["tmp"] / "report/report.html").is_file()


def test_both_images_run_as_nobody_in_particular() -> None:
    """The user that the manifests' volumes belong to, by number: a cluster checks runAsNonRoot so."""
    for file in ("Containerfile", "Containerfile.lab"):
        assert f"\nUSER {GROUP}:{GROUP}\n" in (DEPLOY / "container" / file).read_text()
