"""Kubernetes manifests: the API's own schemas, and references between files that fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from promkit import DEPLOY
from serverkit import PATIENCE_SECONDS

KUBERNETES = DEPLOY / "kubernetes"
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
