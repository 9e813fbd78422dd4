"""A namespace in the cluster that `KUBECONFIG` names, for tests that only a real API server can answer.

Nothing here runs unless `AGENT_SHIM_KUBERNETES=1` allows it: the tests install the chart, which creates a cluster-wide
MutatingAdmissionPolicy. No node is needed; pods are created by server-side dry runs only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.manifests import CHART, Refused, run

RELEASE = "shim-check"


class Cluster:
    """One namespace, with the Helm and kubectl calls that the tests make in it."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def kubectl(self, *args: str | Path, stdin: str = "") -> str:
        """Run kubectl in the namespace and return what it prints. Raises `Refused`."""
        return run("kubectl", "--namespace", self.namespace, *args, stdin=stdin)

    def get(self, *args: str) -> Any:
        """Return the JSON of `kubectl get`."""
        return json.loads(self.kubectl("get", *args, "--output", "json"))

    def apply(self, manifest: dict[str, Any]) -> None:
        """Create or change an object in the namespace."""
        self.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(manifest))

    def helm(self, *sets: str) -> str:
        """Install or upgrade the chart and return Helm's output. Raises `Refused`."""
        more = [part for pair in ("image.registry=registry.example", *sets) for part in ("--set", pair)]
        base = ("helm4", "upgrade", "--install", RELEASE, CHART, "--namespace", self.namespace)
        return run(*base, "--timeout", "60s", *more)

    def uninstall(self) -> None:
        """Remove the release, if there is one."""
        run("helm4", "uninstall", RELEASE, "--namespace", self.namespace, "--ignore-not-found", "--wait")

    def admitted(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Return what the API server makes of a pod, without creating it. Raises `Refused`."""
        named = {**pod, "metadata": {**pod.get("metadata", {}), "generateName": "check-"}}
        created = self.kubectl(
            "create", "--dry-run=server", "--filename", "-", "--output", "json", stdin=yaml.safe_dump(named)
        )
        found: dict[str, Any] = json.loads(created)
        return found


@pytest.fixture(scope="session")
def minor_version() -> int:
    """The minor version of the cluster's Kubernetes. Skips the test visibly where no cluster is named."""
    if os.environ.get("AGENT_SHIM_KUBERNETES") != "1" or not os.environ.get("KUBECONFIG"):
        pytest.skip("needs a cluster: set KUBECONFIG, and AGENT_SHIM_KUBERNETES=1 to allow changes in it")
    version = json.loads(run("kubectl", "version", "--output", "json"))["serverVersion"]["minor"]
    return int(re.sub(r"\D", "", version))


@pytest.fixture
def cluster(minor_version: int) -> Iterator[Cluster]:
    """A namespace of the test's own, removed with all that is in it."""
    made = Cluster(f"agent-shim-{secrets.token_hex(4)}")
    run("kubectl", "create", "namespace", made.namespace)
    try:
        yield made
    finally:
        made.uninstall()
        run("kubectl", "delete", "namespace", made.namespace, "--wait=false")


@pytest.fixture
def injecting(cluster: Cluster, minor_version: int) -> Cluster:
    """The namespace with the chart installed and its policy in force. Skips where the cluster has no such policies."""
    served = run("kubectl", "api-resources", "--api-group=admissionregistration.k8s.io", "--output", "name")
    if "mutatingadmissionpolicies" not in served:
        pytest.skip(f"Kubernetes 1.{minor_version} without MutatingAdmissionPolicy")
    cluster.helm("injection.admissionPolicy.enabled=true")
    probe = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"labels": {"app": "pipeops-agent"}},
        "spec": {"containers": [{"name": "agent", "image": "a", "env": [{"name": "A", "value": "b"}]}]},
    }
    # The API server takes up a new policy within a second or so and has no condition to wait for.
    for _ in range(60):
        try:
            if cluster.admitted(probe)["spec"].get("initContainers"):
                return cluster
        except Refused as refused:
            if "serviceaccount" not in str(refused):
                raise
    pytest.fail("the policy is stored but not in force: is the feature gate MutatingAdmissionPolicy on?")
