"""Shapes of the objects that are read, so that a manifest of another shape ends with an error that says where.

Only fields that are read are here. A key without a value is as if it were not there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shim.cli.inject.sidecar import InjectError

WORKLOADS = frozenset({"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Pod"})


class _Named(msgspec.Struct):
    name: str


class _KeyReference(msgspec.Struct):
    name: str
    key: str


class _ValueSource(msgspec.Struct, rename="camel"):
    secret_key_ref: _KeyReference | None = None


class _Entry(msgspec.Struct, rename="camel"):
    name: str
    value_from: _ValueSource | None = None


class _Source(msgspec.Struct, rename="camel"):
    secret_ref: _Named | None = None


class _Container(msgspec.Struct, rename="camel"):
    name: str
    env: list[_Entry] | None = None
    env_from: list[_Source] | None = None
    volume_mounts: list[_Named] | None = None


class _Spec(msgspec.Struct, rename="camel"):
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None
    volumes: list[_Named] | None = None
    template: _Object | None = None


class _Metadata(msgspec.Struct):
    name: str | None = None
    namespace: str | None = None
    labels: dict[Any, Any] | None = None


class _Status(msgspec.Struct):
    phase: str | None = None


class _Object(msgspec.Struct):
    """A pod, a workload with the template of its pods, or a ConfigMap."""

    metadata: _Metadata | None = None
    spec: _Spec | None = None
    status: _Status | None = None


# In the thread that imports this: several threads at once must not be the first to use a type (`rollout.cluster`).
msgspec.json.Decoder(_Object)


def check(data: Any) -> None:
    """Check an object, or the items of a List. Raises `InjectError`."""
    if not isinstance(data, dict):
        return
    kind = data.get("kind")
    if kind == "List":
        items = data.get("items")
        for item in items if isinstance(items, list) else []:
            check(item)
    elif isinstance(kind, str) and kind in (*WORKLOADS, "ConfigMap"):
        _require(kind, _with_plain_keys(data, {}))


def check_pod(data: Any) -> None:
    """Check a pod in a list of kubectl's. Raises `InjectError`."""
    _require("Pod", data)


def is_pod(data: Any) -> bool:
    """Return True for a map that can be read as a pod or as the template of pods."""
    try:
        _require("Pod", _with_plain_keys(data, {}))
    except InjectError:
        return False
    return True


def _with_plain_keys(data: Any, seen: dict[int, Any]) -> Any:
    """Return a copy whose keys are plain texts: those of a YAML reader that keeps quotes are a type of its own.

    `seen` maps ids to copies, because aliases may share a value, or contain themselves.
    """
    if id(data) in seen or not isinstance(data, (dict, list)):
        return seen.get(id(data), data)
    if isinstance(data, list):
        copies = seen[id(data)] = []
        copies += [_with_plain_keys(each, seen) for each in data]
        return copies
    copy = seen[id(data)] = {}
    copy.update((str(key) if isinstance(key, str) else key, _with_plain_keys(data[key], seen)) for key in data)
    return copy


def _require(kind: str, data: Any) -> None:
    try:
        msgspec.convert(data, _Object)
    except msgspec.ValidationError as error:
        raise InjectError(f"not a {kind} of Kubernetes: {error}") from None
