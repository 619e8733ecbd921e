"""Kubernetes manifests: the API's own schemas, and references between files that fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from promkit import DEPLOY, program
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import BuildError
from vfu_dev.cli.lab import migrate as migrate_command

KUBERNETES = DEPLOY / "kubernetes"
MIGRATE = KUBERNETES / "migrate"
OF_THE_OPERATOR = {"ServiceMonitor", "PrometheusRule"}  # their schemas are not among Kubernetes'
# Old enough to be in use, and the newest that the package has.
VERSIONS = ("1.29", kubernetes_validate.latest_version())


def resources() -> dict[str, dict[str, Any]]:
    """Return file name -> resource."""
    return {file.name: yaml.safe_load(file.read_text()) for file in KUBERNETES.glob("*.yaml")}


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (resource for resource in resources().values() if resource["kind"] == kind)
    return found


def containers() -> dict[str, dict[str, Any]]:
    """Return file name -> the container that serves a device."""
    pod = of_kind("Pod")["spec"]
    daemon = of_kind("DaemonSet")["spec"]["template"]["spec"]
    return {"pod-with-vm.yaml": pod["initContainers"][0], "daemonset.yaml": daemon["containers"][0]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", ["pod-with-vm.yaml", "daemonset.yaml", "service.yaml"])
def test_the_api_would_take_it(file: str, version: str) -> None:
    kubernetes_validate.validate(resources()[file], version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", ["destination.yaml", "networkpolicy.yaml", "service.yaml", "source.yaml"])
def test_the_api_would_take_the_pod_pair(file: str, version: str) -> None:
    kubernetes_validate.validate(yaml.safe_load((MIGRATE / file).read_text()), version, strict=True)


def test_the_pod_pairs_kustomization_is_whole() -> None:
    """It lists every resource; the secrets that the pods mount have the files that their commands read."""
    pair = yaml.safe_load((MIGRATE / "kustomization.yaml").read_text())
    assert set(pair["resources"]) == {path.name for path in MIGRATE.glob("*.yaml")} - {"kustomization.yaml"}
    files = {one["name"]: {Path(file).name for file in one["files"]} for one in pair["secretGenerator"]}
    texts = {
        "vfu-dev-source": (MIGRATE / "ssh/config").read_text() + (MIGRATE / "source.yaml").read_text(),
        "vfu-dev-destination": (DEPLOY / "container/sshd_config").read_text(),
    }
    for secret, text in texts.items():
        assert set(re.findall(r"/etc/vfu-dev/ssh/(\w+)", text)) == files[secret]


def test_the_pod_pair_finds_each_other() -> None:
    """Service and policy select the destination; the policy lets the job's pod in; ssh uses the service."""
    one = {file: yaml.safe_load((MIGRATE / f"{file}.yaml").read_text()) for file in ("destination", "source")}
    service = yaml.safe_load((MIGRATE / "service.yaml").read_text())
    policy = yaml.safe_load((MIGRATE / "networkpolicy.yaml").read_text())["spec"]
    labels = one["destination"]["metadata"]["labels"]
    assert service["spec"]["selector"] == policy["podSelector"]["matchLabels"] == labels
    (peer,) = policy["ingress"][0]["from"]
    assert peer["podSelector"]["matchLabels"] == one["source"]["spec"]["template"]["metadata"]["labels"]
    client = (MIGRATE / "ssh/config").read_text()
    assert f"HostName {service['metadata']['name']}\n" in client
    port = service["spec"]["ports"][0]["port"]
    assert f"Port {port}\n" in client
    assert f"Port {port}\n" in (DEPLOY / "container/sshd_config").read_text()
    (move,) = one["source"]["spec"]["template"]["spec"]["containers"]
    assert move["args"][:2] == ["lab", "migrate"]
    given = migrate_command.make_context("migrate", move["args"][2:]).params
    assert given["destination"] is not None


def test_the_schema_would_notice() -> None:
    resource = resources()["daemonset.yaml"]
    resource["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, VERSIONS[-1], strict=True)


def test_kustomization_lists_all_but_the_example() -> None:
    listed = set(of_kind("Kustomization")["resources"])
    assert listed == {path.name for path in KUBERNETES.glob("*.yaml")} - {
        "kustomization.yaml",
        "pod-with-vm.yaml",
    }


def test_prometheus_finds_the_devices() -> None:
    """The ServiceMonitor selects the service, that the pod and the daemon set, port by port; `job` fits."""
    monitor, service = of_kind("ServiceMonitor"), of_kind("Service")
    labels = service["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["spec"]["jobLabel"]] == "vfu-dev"
    (endpoint,) = monitor["spec"]["endpoints"]
    (port,) = service["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    for template in (of_kind("Pod"), of_kind("DaemonSet")["spec"]["template"]):
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port["port"])
        assert template["metadata"]["annotations"]["prometheus.io/path"] == endpoint["path"]
    for container in containers().values():
        assert {"name": port["targetPort"], "containerPort": port["port"]} in container["ports"]


def test_the_operator_gets_all_rules() -> None:
    command: list[str | Path] = [sys.executable, KUBERNETES / "prometheusrule.py", "--check"]
    done = subprocess.run(command, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, "run: python deploy/kubernetes/prometheusrule.py"


def test_promtool_accepts_the_operators_rules(promtool: Path, tmp_path: Path) -> None:
    """What the operator makes of a PrometheusRule, its spec as a rule file, is one."""
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump(of_kind("PrometheusRule")["spec"]))
    done = subprocess.run(
        [promtool, "check", "rules", file],
        timeout=PATIENCE_SECONDS,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", ["pod-with-vm.yaml", "daemonset.yaml"])
def test_containers_have_no_privileges(file: str) -> None:
    """Baseline and restricted of the Pod Security Standards, but for the daemon set's host path."""
    context = containers()[file]["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert containers()[file]["resources"]["limits"]["memory"]


def test_the_vm_attaches_to_the_device_beside_it() -> None:
    """Both mount the same volume, and QEMU's socket is the server's."""
    pod = of_kind("Pod")["spec"]
    device, vm = pod["initContainers"][0], pod["containers"][0]
    assert device["volumeMounts"] == vm["volumeMounts"]
    (argument,) = (text for text in device["args"] if text.startswith("--socket="))
    assert f'"{argument.removeprefix("--socket=")}"' in vm["args"][vm["args"].index("-device") + 1]


def test_no_unknown_kind() -> None:
    kinds = {resource["kind"] for resource in resources().values()}
    assert kinds - OF_THE_OPERATOR == {"Pod", "DaemonSet", "Service", "Kustomization"}


# --- the sweep


def sweep(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((KUBERNETES / "sweep" / f"{name}.yaml").read_text()))


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["job", "merge", "results"])
def test_the_api_would_take_the_sweep(name: str, version: str) -> None:
    kubernetes_validate.validate(sweep(name), version, strict=True)


def test_the_sweep_is_whole() -> None:
    """There are as many shards as completions; pods of both jobs mount the claim where they write."""
    job, merge, claim = sweep("job"), sweep("merge"), sweep("results")
    environment = {one["name"]: one.get("value") for one in container_of(job)["env"]}
    assert int(environment["SHARDS"]) == job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for one in (job, merge):
        mounts = {mount["name"]: mount["mountPath"] for mount in container_of(one)["volumeMounts"]}
        assert mounts["results"] == environment["RESULTS"]
        volumes = {volume["name"]: volume for volume in one["spec"]["template"]["spec"]["volumes"]}
        assert volumes["results"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    terms = job["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    (term,) = terms["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= labels.items()


def test_the_commands_of_the_sweep_make_a_result(library: Path, tmp_path: Path) -> None:
    """Both command lines, run here: the second of two pods keeps its shard when restarted; both are all."""
    scenario = tmp_path / "two.toml"
    scenario.write_text(
        '[device]\nmemory = "256K"\n[run]\nmoves = 1\nwarmup = 0.1\nverify = "digests"\n'
        '[sweep]\n"qemu.downtime-limit" = [200, 300]\n'
    )
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "vfu-dev"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m vfu_dev "$@"\n')
    shim.chmod(0o755)

    def run(name: str, **environment: str) -> int:
        container = container_of(sweep(name))
        given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        given |= {"SCENARIO": str(scenario), "SHARDS": "2", "RESULTS": str(tmp_path), **environment}
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = [*container["command"], *container["args"]]
        return subprocess.run(
            command, env={**os.environ, **given, "PATH": path}, timeout=PATIENCE_SECONDS, check=False
        ).returncode

    assert run("job", JOB_COMPLETION_INDEX="1", VFU_DEV_MACHINE="node-b") == 0
    made = (tmp_path / "shard-1/two/points/downtime-limit=300.json").read_text()
    assert run("job", JOB_COMPLETION_INDEX="1", VFU_DEV_MACHINE="node-b") == 0
    assert (tmp_path / "shard-1/two/points/downtime-limit=300.json").read_text() == made
    assert run("job", JOB_COMPLETION_INDEX="0", VFU_DEV_MACHINE="node-a") == 0
    assert run("merge") == 0
    rows = (tmp_path / "series/two/moves.csv").read_text().splitlines()[1:]
    assert [row.rpartition(",")[2] for row in rows] == ["node-a", "node-b"]


@pytest.fixture(scope="session", params=[*(["the machine's"] if shutil.which("kubectl") else []), "Debian's"])
def kubectl(request: pytest.FixtureRequest) -> Path:
    """Return kubectl; the machine's own, if it has one, may be years younger than Debian's."""
    try:
        return program("kubectl", own=request.param == "the machine's")
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("folder", [".", "migrate", "sweep"])
def test_kubectl_renders_what_the_kustomization_lists(folder: str, kubectl: Path, tmp_path: Path) -> None:
    """Every resource once; and of the pair the secrets, by the names under which the pods mount them."""
    place = shutil.copytree(KUBERNETES, tmp_path / "kubernetes") / folder
    if folder == "migrate":
        for name in ("id", "known_hosts", "config", "host_key", "authorized_keys"):
            (place / "ssh" / name).write_text(f"a {name} of the test")
    command = [kubectl, "kustomize", place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    rendered = list(yaml.safe_load_all(done.stdout))
    listed = yaml.safe_load((place / "kustomization.yaml").read_text())
    files = [one for name in listed["resources"] for one in yaml.safe_load_all((place / name).read_text())]
    secrets = [one["metadata"]["name"] for one in rendered if one["kind"] == "Secret"]
    kinds = sorted(one["kind"] for one in rendered if one["kind"] != "Secret")
    assert kinds == sorted(one["kind"] for one in files)
    assert len(secrets) == len(listed.get("secretGenerator", ()))
    assert all(f"secretName: {name}" in done.stdout for name in secrets)
