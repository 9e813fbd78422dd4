"""Agents that should have the sidecar but lack it, from the output of `kubectl get pods --output json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shim.cli.inject.shapes import check_pod
from shim.cli.inject.sidecar import API_URL, NAME, OPT_OUT_LABEL, InjectError, env_entry, is_agent, leads_to_loopback

_ALIVE = frozenset({"Pending", "Running"})


@dataclass(frozen=True, slots=True)
class Pod:
    """Pod of an agent; `fault` is `""` if nothing is wrong. Pods that opted out have no fault and are marked."""

    namespace: str
    name: str
    fault: str
    opted_out: bool


def agents(pods: Iterable[Mapping[str, Any]]) -> list[Pod]:
    """Return the running agents among these pods, each with its fault."""
    found = []
    for pod in pods:
        spec, metadata = pod.get("spec") or {}, pod.get("metadata") or {}
        if (pod.get("status") or {}).get("phase", "Running") not in _ALIVE:
            continue
        container = next((each for each in spec.get("containers") or [] if is_agent(each, pod)), None)
        if container is None:
            continue
        opted_out = (metadata.get("labels") or {}).get(OPT_OUT_LABEL) == "disabled"
        fault = "" if opted_out else _fault(spec, container)
        found.append(Pod(metadata.get("namespace", ""), metadata.get("name", ""), fault, opted_out))
    return found


def listed(text: str) -> list[Mapping[str, Any]]:
    """Parse the pods in kubectl's JSON. Raises `InjectError`."""
    wrong = InjectError("not what `kubectl get pods --output json` prints")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(data, dict):
        raise wrong
    items = data.get("items") if str(data.get("kind", "")).endswith("List") else [data]
    if not isinstance(items, list):
        raise wrong
    for item in items:
        try:
            check_pod(item)
        except InjectError:
            raise wrong from None
    return items


def _fault(spec: Mapping[str, Any], container: Mapping[str, Any]) -> str:
    has_sidecar = any(each.get("name") == NAME for each in spec.get("initContainers") or [])
    if spec.get("hostNetwork"):
        return "uses hostNetwork: it cannot have a sidecar, send it to a gateway"
    url = str((env_entry(container, API_URL) or {}).get("value"))
    on_loopback = leads_to_loopback(url)
    calls_us = on_loopback or f"{NAME}." in url
    if not has_sidecar and not calls_us:
        return "has no sidecar: it was made before the injection, or was not matched; restart its Deployment"
    if not calls_us:
        return f"has the sidecar, but {API_URL} of its container {container['name']} does not lead there"
    if on_loopback and not has_sidecar:
        return f"calls {url}, and there is no sidecar"
    return ""
