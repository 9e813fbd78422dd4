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


class _PodSpec(msgspec.Struct, rename="camel"):
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None
    volumes: list[_Named] | None = None


class _Metadata(msgspec.Struct):
    name: str | None = None
    namespace: str | None = None
    labels: dict[Any, Any] | None = None


class _Status(msgspec.Struct):
    phase: str | None = None


class _Pod(msgspec.Struct):
    metadata: _Metadata | None = None
    spec: _PodSpec | None = None
    status: _Status | None = None


class _WorkloadSpec(msgspec.Struct):
    template: _Pod | None = None


class _Workload(msgspec.Struct):
    metadata: _Metadata | None = None
    spec: _WorkloadSpec | None = None


class _ConfigMap(msgspec.Struct):
    metadata: _Metadata | None = None


# In the thread that imports this: several threads at once must not be the first to use a type (`rollout.cluster`).
for _shape in (_Pod, _Workload, _ConfigMap):
    msgspec.json.Decoder(_shape)


def check(data: Any) -> None:
    """Check an object, or the items of a List. Raises `InjectError`."""
    if not isinstance(data, dict):
        return
    kind = data.get("kind")
    if kind == "List":
        items = data.get("items")
        for item in items if isinstance(items, list) else []:
            check(item)
    elif kind == "ConfigMap":
        _require(kind, data, _ConfigMap)
    elif isinstance(kind, str) and kind in WORKLOADS:
        _require(kind, data, _Pod if kind == "Pod" else _Workload)


def check_pod(data: Any) -> None:
    """Check a pod in a list of kubectl's. Raises `InjectError`."""
    _require("Pod", data, _Pod)


def _require(kind: str, data: Any, shape: type[msgspec.Struct]) -> None:
    try:
        msgspec.convert(data, shape)
    except msgspec.ValidationError as error:
        raise InjectError(f"not a {kind} of Kubernetes: {error}") from None
