"""A Kubernetes pod as podman 4.3 (Debian 12) can play it, and no further from the original than that needs.

What podman cannot do: native sidecars (they become containers, and whoever starts the pod must wait for them as the
kubelet does), probes, ports, pod addresses, `env` before `envFrom` (it lets `envFrom` win), and Secrets: its volumes
hold base64 and mix a Secret with a ConfigMap of the same name, so Secrets become ConfigMaps.
"""

from __future__ import annotations

import copy
from typing import Any

POD_IP = "127.0.0.2"
_UNKNOWN = ("ports", "readinessProbe", "livenessProbe", "startupProbe")
Manifest = dict[str, Any]


def playable(pod: Manifest, config_maps: list[Manifest], secrets: list[Manifest], image: str) -> list[Manifest]:
    """The documents for `podman play kube`; every container runs `image`, which is there already."""
    pod = copy.deepcopy(pod)
    spec = pod["spec"]
    spec.pop("serviceAccountName", None)
    for sidecar in spec.pop("initContainers", []):
        assert sidecar.pop("restartPolicy") == "Always", "an init container that ends is no sidecar"
        spec["containers"].insert(0, sidecar)
    for container in spec["containers"]:
        container |= {"image": image, "imagePullPolicy": "Never"}
        for key in _UNKNOWN:
            container.pop(key, None)
        container["env"] = [entry for each in container.get("env", []) if (entry := _env(each))]
        set_ = {entry["name"] for entry in container["env"]}
        for source in container.pop("envFrom", []):
            data = _data(secrets, source["secretRef"]["name"])
            container["env"] += [{"name": key, "value": value} for key, value in data.items() if key not in set_]
    for volume in spec.get("volumes", []):
        if secret := volume.pop("secret", None):
            volume["configMap"] = {"name": _name(secret["secretName"]), "items": secret["items"]}
    return [*map(_config_map, [*config_maps, *secrets]), pod]


def _name(secret: str) -> str:
    return f"secret-{secret}"


def _data(documents: list[Manifest], name: str) -> dict[str, str]:
    (found,) = [each for each in documents if each["metadata"]["name"] == name]
    data: dict[str, str] = found["stringData"]
    return data


def _env(entry: Manifest) -> Manifest | None:
    source = entry.get("valueFrom", {})
    if source.get("fieldRef", {}).get("fieldPath") == "status.podIP":
        return {"name": entry["name"], "value": POD_IP}
    if "value" in entry:
        return {"name": entry["name"], "value": entry["value"].replace("$(POD_IP)", POD_IP)}
    if "fieldRef" in source:
        return None
    if reference := source.pop("secretKeyRef", None):
        source["configMapKeyRef"] = {**reference, "name": _name(reference["name"])}
    return entry


def _config_map(document: Manifest) -> Manifest:
    name = document["metadata"]["name"]
    secret = document["kind"] == "Secret"
    data = document["stringData"] if secret else document["data"]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _name(name) if secret else name},
        "data": data,
    }
