"""Pods of Kubernetes' manifests as processes: our images by buildah, one network namespace per pod.

What a manifest says about images, commands, environment, secrets and volumes is done; probes, limits and
network policies are the cluster's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from promkit import DEPLOY

from vfu_dev.closing import Closing
from vfu_dev.vm.namespaces import ADDRESSES, Namespaces, connect

IMAGES = DEPLOY / "container/images.py"
# Containers within whatever the tests run in: no namespaces of their own but mounts.
ISOLATION = ("--isolation", "chroot")


def buildah(*arguments: str | Path) -> str:
    """Run buildah and return what it printed; a failure shows what it said."""
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"buildah {' '.join(map(str, arguments))}: {done.stderr}"
    return done.stdout.strip()


def build(*names: str) -> None:
    """Build images as `make images` does."""
    command = [sys.executable, IMAGES, "--tool", "buildah", *ISOLATION, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"


def containers_work() -> bool:
    """Tell whether buildah can enter a root here: an empty one, in which it finds no program."""
    if shutil.which("buildah") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["buildah", "from", "scratch"], capture_output=True, text=True, check=False)
    if made.returncode:
        return False
    name = made.stdout.strip()
    try:
        command = ["buildah", "run", *ISOLATION, name, "--", "/nothing"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        return "no such file" in said or "not found" in said
    finally:
        buildah("rm", name)


def manifest(path: Path) -> dict[str, Any]:
    """Return what a file of one resource says."""
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


class Container(Closing):
    """One container of an image: `command` is what to run, or its entry point with `arguments`."""

    def __init__(self, image: str) -> None:
        self.name = buildah("from", "--pull-never", image)
        self._image = image

    def argv(
        self,
        command: list[str] | None,
        arguments: list[str],
        environment: dict[str, str],
        mounts: dict[str, Path],
        read_only: frozenset[str] = frozenset(),
    ) -> list[str]:
        """Return the command line that runs it. `mounts` are places in the container -> folders here."""
        if command is None:
            known = json.loads(buildah("inspect", "--type", "image", self._image))
            command = known["OCIv1"]["config"]["Entrypoint"]
        options = [f"--env={name}={value}" for name, value in environment.items()]
        options += [
            f"--volume={folder}:{place}{':ro' if place in read_only else ''}"
            for place, folder in mounts.items()
        ]
        return [
            "buildah",
            "run",
            *ISOLATION,
            "--network=host",
            *options,
            self.name,
            "--",
            *command,
            *arguments,
        ]

    def close(self) -> None:
        """Remove it; the image stays."""
        buildah("rm", self.name)


class Pods(Closing):
    """Two pods that reach each other by the names of services; all is gone at the end.

    Args: folder: a kustomization's.
          service: the name that leads to the second pod.
    """

    def __init__(self, folder: Path, service: str) -> None:
        self._stack = ExitStack()
        self._scratch = Path(tempfile.mkdtemp(prefix="vfu-pods-"))
        self._stack.callback(shutil.rmtree, self._scratch, ignore_errors=True)
        self._secrets = {
            one["name"]: [folder / file for file in one["files"]]
            for one in manifest(folder / "kustomization.yaml")["secretGenerator"]
        }
        hosts = self._scratch / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{ADDRESSES[1]} {service}\n")
        self.networks = [self._stack.enter_context(Namespaces("net", "mount")) for _ in range(2)]
        connect(*self.networks)
        for one in self.networks:
            one.run("mount", "--bind", str(hosts), "/etc/hosts")

    def volumes(self, pod: dict[str, Any]) -> dict[str, Path]:
        """Make a pod's volumes; returns name -> folder."""
        made = {}
        for volume in pod["volumes"]:
            folder = Path(tempfile.mkdtemp(dir=self._scratch))
            made[volume["name"]] = folder
            folder.chmod(0o1777 if "emptyDir" in volume else 0o755)
            for file in self._secrets[volume["secret"]["secretName"]] if "secret" in volume else ():
                copy = folder / file.name
                shutil.copy(file, copy)
                os.chown(copy, 0, pod["securityContext"]["fsGroup"])
                copy.chmod(volume["secret"]["defaultMode"])
        self._scratch.chmod(0o755)
        return made

    def start(
        self, network: int, container: dict[str, Any], volumes: dict[str, Path]
    ) -> subprocess.Popen[str]:
        """Start one container of a pod in that pod's network."""
        made = self._stack.enter_context(Container(container["image"]))
        mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
        read_only = frozenset(one["mountPath"] for one in container["volumeMounts"] if one.get("readOnly"))
        environment = {one["name"]: one["value"] for one in container.get("env", ())}
        argv = made.argv(container.get("command"), container.get("args", []), environment, mounts, read_only)
        process = subprocess.Popen(
            self.networks[network].enter(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, process)
        return process

    def close(self) -> None:
        """End what runs, and remove everything."""
        self._stack.close()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate()
