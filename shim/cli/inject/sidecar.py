"""The sidecar in an agent's pod: pure changes of a manifest's maps and lists in place.

The chart's policy, the Kustomize components (generated from here) and `agent-shim inject` make the same pod; tests
compare them. `docs/how-to/kubernetes.md` gives the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import click

from shim import __version__
from shim.hosts import is_loopback

NAME = "agent-shim"
INJECTED_LABEL = "agent-shim/sidecar"
OPT_OUT_LABEL = "agent-shim/inject"
AGENT_CONTAINERS = ("agent", "pipeops-agent")
API_URL = "PIPEOPS_API_URL"
TOKEN = "PIPEOPS_TOKEN"  # noqa: S105 - the name of a variable and of a Secret's key
SHIM_URL = "http://127.0.0.1:7080"
UPSTREAM_URL = "SHIM_UPSTREAM__URL"
ADMIN_PORT = 7090
CONFIG_DIR = "/etc/agent-shim"
STORE_DIR = "/var/lib/agent-shim"
TOKEN_DIR = "/var/run/agent-shim"  # noqa: S105 - a directory
API_TOKEN_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a directory
USER = 10001

Map = MutableMapping[str, Any]
PREFIX = f"{NAME}-"


class InjectError(click.ClickException):
    """A manifest that cannot be given the sidecar; the text contains the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Settings that differ between agents.

    `upstream` is the value part of an env entry (`value` or `valueFrom`) with the controller's URL; if it is empty, the
    configuration has the URL. `secret` holds the token under `token_key`; if it is empty, each agent's own token is
    used.
    """

    image: str = f"{NAME}:{__version__}"
    upstream: Mapping[str, Any] | None = None
    secret: str = "pipeops-agent-config"  # noqa: S105 - the name of a Secret
    token_key: str = TOKEN
    config_map: str = NAME

    @property
    def container(self) -> dict[str, Any]:
        """Return a native sidecar: an init container that keeps running and must serve before the agent starts."""
        env: list[dict[str, Any]] = [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}},
            # Probes and Prometheus come to the pod's address, `kubectl port-forward` to loopback.
            {"name": "SHIM_ADMIN__HOST", "value": '["127.0.0.1","$(POD_IP)"]'},
        ]
        if self.upstream:
            env.append({"name": UPSTREAM_URL, **self.upstream})
        mounts = [
            {"name": f"{NAME}-config", "mountPath": CONFIG_DIR, "readOnly": True},
            {"name": f"{NAME}-store", "mountPath": STORE_DIR},
            # Mounted over the place of the agent's ServiceAccount token, which the shim must not have.
            {"name": f"{NAME}-empty", "mountPath": API_TOKEN_DIR, "readOnly": True},
        ]
        if self.secret:
            mounts.append({"name": f"{NAME}-token", "mountPath": TOKEN_DIR, "readOnly": True})
        return {
            "name": NAME,
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "restartPolicy": "Always",
            "args": ["run", "--config", f"{CONFIG_DIR}/config.yaml"],
            "env": env,
            "ports": [{"name": "shim-admin", "containerPort": ADMIN_PORT, "protocol": "TCP"}],
            "startupProbe": _probe("/readyz", period_s=1, failures=60),
            "readinessProbe": _probe("/readyz", period_s=10, failures=3),
            "livenessProbe": _probe("/healthz", period_s=10, failures=6),
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": mounts,
        }

    @property
    def volumes(self) -> list[dict[str, Any]]:
        """Return the volumes. The Secret is a file, so that a changed token needs no restart."""
        volumes: list[dict[str, Any]] = [
            {"name": f"{NAME}-config", "configMap": {"name": self.config_map, "defaultMode": 0o444}},
            {"name": f"{NAME}-store", "emptyDir": {"sizeLimit": "1Gi"}},
            {"name": f"{NAME}-empty", "emptyDir": {"sizeLimit": "1Mi"}},
        ]
        if self.secret:
            items = [{"key": self.token_key, "path": "token"}]
            secret = {"secretName": self.secret, "items": items, "defaultMode": 0o444}
            volumes.append({"name": f"{NAME}-token", "secret": secret})
        return volumes

    @property
    def settings(self) -> dict[str, Any]:
        """Return the shim's configuration file for this pod (docs/reference/configuration.md)."""
        upstream = {"token_file": f"{TOKEN_DIR}/token"} if self.secret else {}
        return {
            "mode": "websocket",
            "listen": {"host": "127.0.0.1", "port": 7080},
            "admin": {"port": ADMIN_PORT},
            **({"upstream": upstream} if upstream else {}),
            "store": {"path": f"{STORE_DIR}/data/agent-shim.db"},
        }


def _probe(path: str, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "shim-admin", "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": 3,
        "successThreshold": 1,
        "failureThreshold": failures,
    }


def recognise(agent: Mapping[str, Any], image: str, config_map: str, own_token: bool) -> Sidecar:
    """Find how the agent receives its URL and token (docs/reference/legacy-agents.md#5-deployment-objects).

    That is a Secret as a whole, or entries key by key. Raises `InjectError` if the manifest does not show it.
    """
    names = [source["secretRef"]["name"] for source in agent.get("envFrom") or [] if "secretRef" in source]
    url = env_entry(agent, API_URL)
    upstream: Mapping[str, Any] | None = None
    if url is not None:
        upstream = {key: url[key] for key in ("value", "valueFrom") if key in url}
        _check_address(str(upstream.get("value", "")), agent["name"])
    elif names:
        upstream = {"valueFrom": {"secretKeyRef": {"name": names[0], "key": API_URL, "optional": True}}}
    if own_token:
        return Sidecar(image, upstream, "", "", config_map)
    token = env_entry(agent, TOKEN)
    if token is not None:
        reference = (token.get("valueFrom") or {}).get("secretKeyRef")
        if reference is None:
            raise InjectError(f"{TOKEN} of container {agent['name']} is in no Secret: use --own-token")
        return Sidecar(image, upstream, reference["name"], reference["key"], config_map)
    if not names:
        raise InjectError(f"container {agent['name']} takes {TOKEN} from no Secret: use --own-token")
    return Sidecar(image, upstream, names[0], TOKEN, config_map)


def _check_address(url: str, container: str) -> None:
    """Raise `InjectError` for a value of `API_URL` that does not lead the sidecar to the controller."""
    if leads_to_loopback(url):
        raise InjectError(f"{API_URL} of container {container} is {url} already: set the real URL")
    if "$(" in url:
        raise InjectError(
            f"{API_URL} of container {container} is {url}: the sidecar has none of the agent's variables, write it out"
        )


def add(template: Map, sidecar: Sidecar, agent: Map) -> None:
    """Put the sidecar into a pod template (`metadata`, `spec`) and point its container `agent` to it.

    Raises `InjectError` for pods in the node's network, where loopback is shared with the node, and for pods in which a
    container or a volume has a name of the sidecar's.
    """
    spec = template["spec"]
    if spec.get("hostNetwork"):
        raise InjectError("the pod uses hostNetwork, where 127.0.0.1 is the whole node's: use the chart's gateway mode")
    taken = {each["name"] for each in [*spec["containers"], *(spec.get("volumes") or [])]}
    if ours := taken & {NAME, *(volume["name"] for volume in sidecar.volumes)}:
        raise InjectError(f"the pod has a container or a volume named {min(ours)}, as the sidecar would: rename it")
    _own(_own(template, "metadata", dict), "labels", dict)[INJECTED_LABEL] = "enabled"
    if "initContainers" not in spec:
        _insert(spec, "containers", "initContainers", [])
    _own(spec, "initContainers", list).insert(0, sidecar.container)
    _own(spec, "volumes", list)[:0] = sidecar.volumes
    env, entry = _own(agent, "env", list), env_entry(agent, API_URL)
    if entry is not None:
        entry.pop("valueFrom", None)
        entry["value"] = SHIM_URL
    else:
        env.insert(0, {"name": API_URL, "value": SHIM_URL})


def remove(template: Map) -> bool:
    """Remove the sidecar from a pod template and restore the agent's own URL; return True if there was a sidecar."""
    spec = template["spec"]
    ours = [container for container in spec.get("initContainers") or [] if container["name"] == NAME]
    for container in ours:
        spec["initContainers"].remove(container)
        for agent in spec["containers"]:
            _give_back(agent, env_entry(container, UPSTREAM_URL))
    volumes = spec.get("volumes") or []
    mounted = {mount["name"] for container in ours for mount in container.get("volumeMounts") or []}
    for volume in [each for each in volumes if each["name"].startswith(PREFIX) and each["name"] in mounted]:
        volumes.remove(volume)
    metadata = template.get("metadata") or {}
    if (metadata.get("labels") or {}).pop(INJECTED_LABEL, None):
        _drop_empty(metadata, "labels")
        _drop_empty(template, "metadata")
    if ours:
        _drop_empty(spec, "initContainers")
        _drop_empty(spec, "volumes")
    return bool(ours)


def _drop_empty(parent: Map, key: str) -> None:
    if key in parent and not parent[key]:
        del parent[key]


def _give_back(agent: Map, upstream: Map | None) -> None:
    entry = env_entry(agent, API_URL)
    if entry is None or entry.get("value") != SHIM_URL:
        return
    reference = ((upstream or {}).get("valueFrom") or {}).get("secretKeyRef") or {}
    if upstream is None or reference.get("optional"):
        agent["env"].remove(entry)
        _drop_empty(agent, "env")
        return
    del entry["value"]
    entry.update((key, value) for key, value in upstream.items() if key != "name")


def env_entry(container: Mapping[str, Any], name: str) -> Any:
    """Return the env entry of this name; the last one counts, as in Kubernetes."""
    return next((entry for entry in reversed(container.get("env") or []) if entry.get("name") == name), None)


def leads_to_loopback(url: str) -> bool:
    """Return True for a URL whose host is this pod itself."""
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def is_agent(container: Mapping[str, Any], template: Mapping[str, Any]) -> bool:
    """Return True if this is the vendor's agent: by its container's name, and by other marks of the vendor."""
    name = container.get("name")
    if name not in AGENT_CONTAINERS:
        return False
    around = f"{container}{(template.get('metadata') or {}).get('labels')}".lower()
    return name != "agent" or "pipeops" in around


def _own(parent: Map, key: str, kind: type) -> Any:
    """Return the value of a key for changes: created if it is missing, copied if a YAML alias shares it."""
    found = parent.get(key)
    if found is None:
        found = parent[key] = kind()
    elif getattr(getattr(found, "anchor", None), "value", None):
        found = parent[key] = deepcopy(found)
        found.yaml_set_anchor(None)
    return found


def _insert(parent: Map, before: str, key: str, value: MutableSequence[Any]) -> None:
    """Insert a key before another if the map keeps an order of its own (that of a round-trip library)."""
    insert = getattr(parent, "insert", None)
    if insert is None:
        parent[key] = value
    else:
        insert(list(parent).index(before), key, value)
