"""Manifests of another shape than Kubernetes': an error with the place, never a traceback, whatever stands where."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from shim.cli.inject.documents import Options, inject, remove
from shim.cli.inject.missing_sidecars import listed
from shim.cli.inject.sidecar import InjectError
from tests.support.manifests import vendor_text
from tests.support.threads import exit_code_of_first_calls

OPTIONS = Options("r.example/agent-shim:1", own_token=True)
AGENT = {"name": "pipeops-agent"}
POD_SPECS: dict[str, Any] = {
    "$.spec.containers": {"containers": "text"},
    "$.spec.containers[0]": {"containers": ["text"]},
    "$.spec.containers[0].env": {"containers": [{**AGENT, "env": {"A": "b"}}]},
    "$.spec.containers[0].env[0]": {"containers": [{**AGENT, "env": ["A"]}]},
    "missing required field `name` - at `$.spec.containers[0].env[0]`": {"containers": [{**AGENT, "env": [{}]}]},
    "$.spec.containers[0].envFrom": {"containers": [{**AGENT, "envFrom": "text"}]},
    "$.spec.containers[0].envFrom[0].secretRef": {"containers": [{**AGENT, "envFrom": [{"secretRef": "text"}]}]},
    "$.spec.volumes": {"containers": [AGENT], "volumes": "text"},
    "$.spec.volumes[0]": {"containers": [AGENT], "volumes": [{"emptyDir": {}}]},
    "$.spec.initContainers": {"containers": [AGENT], "initContainers": "text"},
    "$.spec.initContainers[0]": {"containers": [AGENT], "initContainers": [{"image": "x"}]},
}


@pytest.mark.parametrize("place", POD_SPECS)
def test_the_place_is_named_and_no_value(place: str) -> None:
    text = yaml.safe_dump({"kind": "Pod", "spec": POD_SPECS[place]})
    for change in (lambda: inject(text, OPTIONS), lambda: remove(text)):
        with pytest.raises(InjectError) as refused:
            change()
        assert "not a Pod of Kubernetes" in str(refused.value)
        assert place in str(refused.value)
        assert "text" not in str(refused.value)


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "Pod", "metadata": "x", "spec": {"containers": [AGENT]}},
        {"kind": "Pod", "metadata": {"labels": ["x"]}, "spec": {"containers": [AGENT]}},
        {"kind": "Deployment", "metadata": "x", "spec": {"template": {"spec": {"containers": [AGENT]}}}},
        {"kind": "Deployment", "spec": {"template": "x"}},
        {"kind": "ConfigMap", "metadata": {"labels": "x"}},
        {"kind": "List", "items": [{"kind": "ConfigMap", "metadata": "x"}]},
    ],
)
def test_other_places_are_checked_too(document: dict[str, Any]) -> None:
    with pytest.raises(InjectError, match="of Kubernetes: Expected"):
        inject(yaml.safe_dump(document), OPTIONS)


@pytest.mark.parametrize(
    "other", ["kind: [a]\n", "kind: 5\n", "- a\n", "text\n", "kind: List\nitems: x\n", "kind: Pod\n"]
)
def test_what_is_no_workload_stays_as_it_is(other: str) -> None:
    assert remove(other) == other
    assert inject(f"{other}---\n{vendor_text('manifest')}", OPTIONS).startswith(other)


def test_a_manifest_that_is_nested_too_deeply() -> None:
    with pytest.raises(InjectError, match="nested too deeply"):
        inject("a: " + "[" * 5000, OPTIONS)


@pytest.mark.parametrize(
    "items", ["[" * 100_000, [1], [None], [{"spec": {"containers": "x"}}], [{"metadata": {"labels": [1]}}]]
)
def test_pods_that_kubectl_would_not_print(items: Any) -> None:
    text = items if isinstance(items, str) else json.dumps({"kind": "List", "items": items})
    with pytest.raises(InjectError, match="not what `kubectl get pods --output json` prints"):
        listed(text)


def test_pods_of_several_clusters_may_be_looked_at_at_the_same_time() -> None:
    pod = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "x", "env": [{"name": "n", "value": "v"}]}]}}
    for _ in range(10):  # a third of them ended by a segmentation fault
        assert exit_code_of_first_calls("shim.cli.inject.shapes", "check_pod", json.dumps(pod)) == 0
