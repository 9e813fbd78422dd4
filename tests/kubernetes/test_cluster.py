"""The chart on a real API server: what is admitted, what is refused at installation, rollback and removal."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.kubernetes.conftest import RELEASE, Cluster
from tests.support.manifests import Refused, container, env_of, pod_of, run, vendor_text

pytestmark = [pytest.mark.needs("helm4", "kubectl"), pytest.mark.timeout(400)]


def bare_pod(**agent: Any) -> dict[str, Any]:
    """The smallest pod that the policy matches."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"labels": {"app": "pipeops-agent"}},
        "spec": {"containers": [{"name": "agent", "image": "a", **agent}]},
    }


def test_an_agent_without_variables_gets_the_sidecar(injecting: Cluster) -> None:
    made = injecting.admitted(bare_pod())
    assert [each["name"] for each in made["spec"]["initContainers"]] == ["agent-shim"]
    assert env_of(container(made, "agent")) == {"PIPEOPS_API_URL": "http://127.0.0.1:7080"}


@pytest.mark.parametrize("shape", ["manifest", "installer"])
def test_the_vendors_pods_get_the_sidecar(shape: str, injecting: Cluster) -> None:
    pod = pod_of(vendor_text(shape))
    pod["spec"].pop("serviceAccountName", None)
    made = injecting.admitted(pod)
    assert made["spec"]["initContainers"][0]["restartPolicy"] == "Always"
    assert env_of(container(made, "agent"))["PIPEOPS_API_URL"] == "http://127.0.0.1:7080"


@pytest.mark.parametrize(
    "source",
    [
        {"value": "https://eu.example"},
        {"valueFrom": {"secretKeyRef": {"name": "urls", "key": "api"}}},
        {"valueFrom": {"configMapKeyRef": {"name": "urls", "key": "api"}}},
        {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.annotations['api']"}}},
    ],
    ids=["value", "secret", "config-map", "field"],
)
def test_the_agents_url_moves_to_the_sidecar(source: dict[str, Any], injecting: Cluster) -> None:
    made = injecting.admitted(bare_pod(env=[{"name": "PIPEOPS_API_URL", **source}]))
    (moved,) = [e for e in container(made, "agent-shim")["env"] if e["name"] == "SHIM_UPSTREAM__URL"]
    assert moved == {"name": "SHIM_UPSTREAM__URL", **source}


def test_a_name_that_is_taken_leaves_the_pod_alone(injecting: Cluster) -> None:
    pod = bare_pod()
    pod["spec"]["containers"].append({"name": "agent-shim", "image": "another"})
    assert "initContainers" not in injecting.admitted(pod)["spec"]


def test_the_pod_fits_the_restricted_standard(injecting: Cluster) -> None:
    run("kubectl", "label", "namespace", injecting.namespace, "pod-security.kubernetes.io/enforce=restricted")
    pod = bare_pod(securityContext={"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}})
    pod["spec"]["securityContext"] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert injecting.admitted(pod)["spec"]["initContainers"]


def test_quotas_and_limit_ranges_are_met_with_the_documented_values(injecting: Cluster) -> None:
    limit = {"type": "Container", "min": {"memory": "100Mi"}}
    limits = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "l"}, "spec": {"limits": [limit]}}
    injecting.apply(limits)
    pod = bare_pod(resources={"requests": {"memory": "100Mi"}, "limits": {"memory": "200Mi", "cpu": "100m"}})
    with pytest.raises(Refused, match="100Mi"):
        injecting.admitted(pod)
    injecting.helm("injection.admissionPolicy.enabled=true", "resources.requests.memory=100Mi")
    for _ in range(60):
        try:
            made = injecting.admitted(pod)
            break
        except Refused:
            continue
    assert made["spec"]["initContainers"]


@pytest.mark.parametrize(
    "values",
    [
        {"extraEnv": [{"name": "A B=", "value": "x"}]},
        {"extraEnv": [{"name": "A", "valueFrom": {"secretRef": {"name": "x"}}}]},
        {"extraVolumes": [{"name": "agent-shim-x", "configMap": {"nam": "x"}}]},
        {"securityContext": {"runAsUser": "me"}},
        {"resources": {"requests": {"memory": "2Gi"}}},
    ],
    ids=["name", "source", "volume", "user", "request-above-limit"],
)
def test_what_a_pod_would_be_refused_for_fails_the_installation(
    values: dict[str, Any], cluster: Cluster, tmp_path: Any
) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"image": {"registry": "r.example"}, **values}))
    template = run(
        "helm4", "template", RELEASE, "helm/agent-shim", "--namespace", cluster.namespace, "--values", file,
        "--set", "injection.admissionPolicy.enabled=true", "--show-only", "templates/podtemplate.yaml",
    )  # fmt: skip
    with pytest.raises(Refused):
        cluster.kubectl("create", "--dry-run=server", "--validate=strict", "--filename", "-", stdin=template)


def test_the_gateway_and_its_removal(cluster: Cluster) -> None:
    cluster.helm("mode=gateway", "injection.admissionPolicy.enabled=false", "monitoring.podMonitor.enabled=false")
    assert cluster.get("deployment", f"{RELEASE}-agent-shim")["spec"]["replicas"] == 1
    cluster.uninstall()
    assert cluster.get("deployment")["items"] == []


def test_rollback_is_one_value_and_removal_leaves_nothing(injecting: Cluster) -> None:
    injecting.helm("injection.admissionPolicy.enabled=true", "config.mode=http")
    config = injecting.get("configmap", f"{RELEASE}-agent-shim")["data"]["config.yaml"]
    assert yaml.safe_load(config)["mode"] == "http"
    injecting.uninstall()
    left = run("kubectl", "get", "mutatingadmissionpolicies", "--output", "name")
    assert injecting.namespace not in left
    assert [each["metadata"]["name"] for each in injecting.get("podtemplate")["items"]] == []


def test_a_changed_key_of_the_token_leaves_no_old_one(cluster: Cluster) -> None:
    off = "injection.admissionPolicy.enabled=false"
    token = ("upstream.token.from=value", "upstream.token.value=t")
    cluster.helm(off, *token, "upstream.token.secretKey=old")
    cluster.helm(off, *token, "upstream.token.secretKey=new")
    assert set(cluster.get("secret", f"{RELEASE}-agent-shim-token")["data"]) == {"new"}


def test_a_release_with_a_number_for_a_name_installs(cluster: Cluster) -> None:
    image = ("--set", "image.registry=registry.example", "--set", "injection.admissionPolicy.enabled=false")
    run("helm4", "install", "1234567", "helm/agent-shim", "--namespace", cluster.namespace, *image)
    labels = cluster.get("configmap", "1234567-agent-shim")["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "1234567"
    run("helm4", "uninstall", "1234567", "--namespace", cluster.namespace)
