"""The code that all dialects share: lenient reading of requests, and exact replies.

The field map of requests is docs/reference/legacy-agents.md#4-field-mapping-http-to-websocket. A field of the wrong
type never rejects a call: a number in place of a text becomes text, and any other value counts as absent.

Replies are supersets that every generation decodes (docs/reference/protocol.md#1-legacy-side). All types are exact,
whatever the controller sent. One wrong type makes a Go agent discard the whole reply, and some agents exit then
(docs/reference/legacy-agents.md#11-register).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from shim.core.agent_calls import (
    Accepted,
    Commands,
    Failed,
    Healthy,
    HeartbeatCall,
    Outcome,
    RegisterCall,
    Registered,
    ResultCall,
    SessionTarget,
    TunnelInfo,
    TunnelState,
)
from shim.core.bounds import (
    MAX_DEPTH,
    MAX_ID_BYTES,
    MAX_KEPT_BYTES,
    MAX_KEPT_VALUES,
    MAX_LABELS,
    MAX_NAME_CHARS,
    MAX_WORD_CHARS,
    cut,
)
from shim.errors import AgentError
from shim.protocol import rfc3339
from shim.protocol.controller_replies import integer, url_safe_id
from shim.protocol.dialects import Call, Reply, error_reply

_TEXTS = ("k8s_version", "hostname", "agent_version", "server_ip", "region", "cloud_provider", "cluster_id")
_OBJECTS = ("tunnel_port_config", "server_specs", "metadata")
_MAPPED = frozenset(
    {"agent_id", "id", "name", "cluster_name", "version", "labels", "tunnel_config", *_TEXTS, *_OBJECTS}
)
# `features` would announce features of a WebSocket agent, which the legacy agent behind the shim does not have.
_DROPPED = frozenset(
    {"status", "last_seen", "control_plane_url", "server_code", "cluster_url", "cluster_cert_data", "features"}
)
_MONITORING = re.compile(r"(tunnel_)?(prometheus|loki|grafana|opencost)_\w+")
_SECRET = re.compile(
    r"token|passw|secret|credential|authorization|cookie|kubeconfig|(private|api|access)_?key", re.IGNORECASE
)
_HOST_KEYS = ("k8s_version", "hostname", "server_ip", "region", "cloud_provider")
_ANY_HOST_KEY = frozenset(_HOST_KEYS)
_NAME_KEYS = frozenset({"cluster_name", "name"})
_VERSION_KEYS = frozenset({"agent_version", "version"})
_KNOWN_KEYS = _NAME_KEYS | _VERSION_KEYS | _ANY_HOST_KEY
_GROUPS = (
    ("prometheus_url", "prometheus"),
    ("loki_url", "loki"),
    ("grafana_url", "grafana"),
    ("opencost_base_url", "opencost"),
)
_MONITORED = frozenset(url_key for url_key, _ in _GROUPS)
_PLAIN_ID = re.compile(r"[A-Za-z0-9_\-]{1,256}", re.ASCII)


def valid_id(data: bytes | str, what: str = "id") -> str:
    """Return an id from a path or a body as text. Raises `AgentError` 400, whose text names it as `what`.

    An id must be 1-256 printable bytes without `/`, and neither `.` nor `..`
    (docs/reference/protocol.md#1-legacy-side).
    """
    if isinstance(data, str) and _PLAIN_ID.fullmatch(data):
        return data
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise AgentError(400, f"invalid {what}") from None
    if not 1 <= len(raw) <= MAX_ID_BYTES or "/" in text or text in (".", "..") or not text.isprintable():
        raise AgentError(400, f"invalid {what}")
    return text


def body_object(call: Call) -> dict[str, Any]:
    """Return the request's JSON object.

    Raises `AgentError` 400 if it is no object or nested deeper than `MAX_DEPTH`.
    """
    if not isinstance(call.body, dict):
        raise AgentError(400, "the body must be a JSON object")
    if call.shallow:
        return call.body
    level: list[Any] = [call.body]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return call.body
    raise AgentError(400, "the body is nested too deeply")


def text(value: Any) -> str:
    """Return a value as text: numbers are converted, anything else that is no string becomes `""`."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else ""
    # Python raises an error for printing an integer of thousands of digits. No field has more than 64 bits.
    plain = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64
    return str(value) if plain else ""


def word(value: Any) -> str:
    """Return a descriptive text (no id), cut to `MAX_WORD_CHARS`."""
    if isinstance(value, str) and len(value) <= MAX_WORD_CHARS:
        return value
    return cut(text(value), MAX_WORD_CHARS)


def bounded_object(call: Call) -> dict[str, Any]:
    """Return the JSON object of a call that is kept in memory. Raises `AgentError` 413 if it is too large."""
    if call.size_bytes > MAX_KEPT_BYTES:
        raise AgentError(413, f"a registration or heartbeat may have {MAX_KEPT_BYTES} bytes, this one has more")
    body: dict[str, Any] = call.body if call.shallow and isinstance(call.body, dict) else body_object(call)
    if call.size_bytes > MAX_KEPT_VALUES and _count_values(body) > MAX_KEPT_VALUES:
        raise AgentError(413, f"a registration or heartbeat may have {MAX_KEPT_VALUES} values, this one has more")
    return body


def _count_values(value: Any) -> int:
    found, level = 0, [value]
    while level:
        found += len(level)
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return found


def first_text(source: Mapping[str, Any], *keys: str) -> str:
    """Return the first of these fields that is a non-empty text, else `""`."""
    for key in keys:
        found = text(source.get(key))
        if found:
            return found
    return ""


def object_or_empty(value: Any) -> dict[str, Any]:
    """Return the value if it is a JSON object, else `{}`."""
    return value if isinstance(value, dict) else {}


def read_register(
    dialect: str, call: Call, *, secret_keys: tuple[str, ...] = ("k8s_service_token",), known_by_agent: bool = False
) -> RegisterCall:
    """Read a registration (docs/reference/protocol.md#11-register).

    The agent's id is `agent_id`, else `id`, else that of the path; its name is `cluster_name`, else `name`. The
    ServiceAccount token is the first of `secret_keys`. Unknown fields are kept, except those with the name of a secret,
    because registrations are stored. Raises `AgentError` 400 without an id or a name.
    """
    body = bounded_object(call)
    agent_id = first_text(body, "agent_id", "id") or call.params.get("agent_id", "")
    if not agent_id:
        raise AgentError(400, "agent_id is required")
    name = _name(body)
    if not name:
        raise AgentError(400, "name or cluster_name is required")
    agent_id = valid_id(agent_id, "agent_id")
    return RegisterCall(
        dialect=dialect,
        agent_id=agent_id,
        name=name,
        payload={"agent_id": agent_id, "name": name, **_mapped(body), **_unknown(body)},
        secret=first_text(body, *secret_keys),
        known_by_agent=known_by_agent,
    )


def _name(body: dict[str, Any]) -> str:
    """Return the agent's name in a body, `""` without one. Raises `AgentError` 400 if it is too long."""
    name = first_text(body, "cluster_name", "name")
    if len(name) > MAX_NAME_CHARS:
        raise AgentError(400, f"name or cluster_name may have {MAX_NAME_CHARS} characters")
    return name


def _mapped(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an upstream `register` that the body has, without `agent_id` and `name`."""
    if len(text(body.get("cluster_id")).encode("utf-8", "replace")) > MAX_ID_BYTES:
        raise AgentError(400, "invalid cluster_id")
    given = object_or_empty(body.get("labels")).items()
    labels = dict([(cut(key, MAX_WORD_CHARS), word(value)) for key, value in given if _is_text(value)][:MAX_LABELS])
    found: dict[str, Any] = {key: word(body.get(key)) for key in _TEXTS}
    found |= {key: object_or_empty(body.get(key)) for key in _OBJECTS}
    found["agent_version"] = word(first_text(body, "agent_version", "version"))
    found["hostname"] = found["hostname"] or labels.get("hostname")
    found["tunnel_port_config"] = found["tunnel_port_config"] or object_or_empty(body.get("tunnel_config"))
    found["metadata"] = _without_secrets(found["metadata"])
    found["labels"] = labels
    return {key: value for key, value in found.items() if value}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or text(value) != ""


def _unknown(body: dict[str, Any]) -> dict[str, Any]:
    known = _MAPPED | _DROPPED
    kept = {key: value for key, value in body.items() if key not in known and not _MONITORING.fullmatch(key)}
    return _without_secrets(kept)


def _without_secrets(source: dict[str, Any]) -> dict[str, Any]:
    return {key: _cleaned(value) for key, value in source.items() if not _SECRET.search(key)}


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_secrets(value)
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def read_heartbeat(
    dialect: str,
    target: SessionTarget,
    agent_id: str,
    body: dict[str, Any],
    *,
    size_bytes: int,
    tunnel_status: str = "",
    secret: str = "",
) -> HeartbeatCall:
    """Read a heartbeat of `target`. An empty `agent_id` is unknown.

    `tunnel_status` is the default if the body has none. `secret` is the ServiceAccount token, if the body has it.
    """
    payload = {} if _MONITORED.isdisjoint(body) else _monitoring(body)
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        payload["metadata"] = metadata
    else:
        metadata = {}
    # Many heartbeats have none of these fields: test for the keys first.
    known = {} if _KNOWN_KEYS.isdisjoint(body) and _KNOWN_KEYS.isdisjoint(metadata) else _known(body, metadata)
    return HeartbeatCall(
        dialect=dialect,
        target=target,
        agent_id=agent_id,
        status=word(body.get("status")),
        tunnel_status=word(body.get("tunnel_status")) or tunnel_status,
        payload=payload,
        known=known,
        secret=secret,
        size_bytes=size_bytes,
    )


def _monitoring(body: dict[str, Any]) -> dict[str, Any]:
    """Return the monitoring groups of a heartbeat: those that have a URL, with the fields that are present."""
    found: dict[str, Any] = {}
    for url_key, group in _GROUPS:
        url = text(body[url_key]) if url_key in body else ""
        if not url:
            continue
        found[url_key] = url
        for key in (f"{group}_username", f"{group}_password"):
            if text(body.get(key)):
                found[key] = text(body[key])
        if isinstance(body.get(f"{group}_ssl"), bool):
            found[f"{group}_ssl"] = body[f"{group}_ssl"]
    return found


def _known(body: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the heartbeat's fields for the registration of an adopted session.

    The rule is docs/reference/protocol.md#14-adoption.
    """
    found = {}
    if not _NAME_KEYS.isdisjoint(body) and (name := _name(body)):
        found["name"] = name
    for source in (metadata, body):
        if not _VERSION_KEYS.isdisjoint(source):
            version = word(source.get("agent_version", "")) or word(source.get("version", ""))
            if version:
                found["agent_version"] = version
        if not _ANY_HOST_KEY.isdisjoint(source):
            found |= {key: value for key in _HOST_KEYS if (value := word(source.get(key)))}
    return found


def read_result(dialect: str, target: SessionTarget, call: Call) -> ResultCall:
    """Read a command result. Raises `AgentError` 400 unless `success` is a boolean.

    `output` and `error` become text, and a JSON value becomes its JSON text, because no output may be lost. A
    `timestamp` that is no RFC 3339 and `metadata` that is no object are dropped.
    """
    body = body_object(call)
    success = body.get("success")
    if not isinstance(success, bool):
        raise AgentError(400, "success must be a boolean")
    result: dict[str, Any] = {"success": success}
    for key in ("output", "error"):
        if body.get(key) is not None:
            result[key] = _as_text(body[key])
    if isinstance(body.get("metadata"), dict):
        result["metadata"] = body["metadata"]
    if rfc3339.parse(body.get("timestamp")):
        result["timestamp"] = body["timestamp"]
    return ResultCall(dialect, target, call.params["command_id"], result)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (ValueError, OverflowError):  # UnicodeEncodeError is a ValueError
        raise AgentError(400, "output and error must be strings") from None


# --- replies ----------------------------------------------------------------------------------------------------------

_NO_CONTENT = Reply(204)
_ACCEPTED = Reply(200, {"success": True})


def render(operation: str, outcome: Outcome, call: Call) -> Reply:  # noqa: ARG001 - a dialect's own may need it
    """Return the reply to a call, which satisfies all generations and depends on the outcome alone."""
    match outcome:
        case Registered():
            return _registered(outcome)
        case Accepted():
            # Go agents do not read the body of a success. Go's client then drops the connection if there is one
            # (docs/reference/legacy-agents.md#10-common-to-all-ab-clients).
            return _NO_CONTENT if call.user_agent.startswith("Go-http-client") else _ACCEPTED
        case Commands():
            return Reply(200, _commands(outcome))
        case TunnelState():
            return Reply(200, _tunnel(outcome))
        case TunnelInfo():
            return Reply(200, _tunnel_info(outcome.registered))
        case Healthy():
            return Reply(200, {"status": "healthy"})
        case Failed():
            usable = url_safe_id(outcome.cluster_id)
            return error_reply(outcome if usable else replace(outcome, cluster_id=""))


def _registered(known: Registered) -> Reply:
    """Return a registration with its ids in both places that agents read, without token and gateway."""
    if not url_safe_id(known.cluster_id):
        return error_reply(Failed(502, "the controller returned a cluster id that agents cannot use"))
    cluster: dict[str, Any] = {
        "id": known.cluster_id,
        "uuid": known.cluster_uuid,
        "name": known.name,
        "status": known.status,
        "agent_id": known.agent_id,
    }
    data: dict[str, Any] = {"cluster_id": known.cluster_id, "status": known.status, "tunnel_url": known.tunnel_url}
    workspace_id = integer(known.workspace_id)
    if workspace_id is not None:
        cluster["workspace_id"] = workspace_id
    if rfc3339.parse(known.registered_at):
        cluster["registered_at"] = data["registered_at"] = known.registered_at
    return Reply(
        200,
        {
            "success": True,
            "message": "registered (cached)" if known.cached else "registered",
            "cluster_id": known.cluster_id,
            "cluster_uuid": known.cluster_uuid,
            "name": known.name,
            "status": known.status,
            "tunnel_url": known.tunnel_url,
            "api_server": known.api_server,
            "cluster": cluster,
            "data": data,
        },
    )


def _commands(answer: Commands) -> dict[str, Any]:
    return {
        "success": True,
        "commands": list(map(asdict, answer.commands)),
        "status": "IDLE",
        "poll_frequency": answer.poll_frequency_s,
    }


def _tunnel(state: TunnelState) -> dict[str, Any]:
    """Return the controller's tunnel state without values that agents cannot decode.

    The fields are docs/reference/protocol.md#15-tunnel-poll.
    """
    payload = state.payload or {}
    out: dict[str, Any] = {"status": "IDLE", "poll_frequency": state.poll_frequency_s}
    for key in ("status", "credentials", "tunnel_server_addr", "server_fingerprint"):
        if isinstance(payload.get(key), str):
            out[key] = payload[key]
    frequency_s = integer(payload.get("poll_frequency"))
    if frequency_s is not None and frequency_s > 0:
        out["poll_frequency"] = frequency_s
    forwards = payload.get("forwards")
    if isinstance(forwards, list):
        out["forwards"] = [forward for forward in map(_forward, forwards) if forward]
    return out


def _forward(forward: Any) -> dict[str, Any] | None:
    port = integer(forward.get("remote_port")) if isinstance(forward, dict) else None
    if port is None or not isinstance(forward.get("name"), str):
        return None
    return {"name": forward["name"], "remote_port": port}


def _tunnel_info(known: Registered) -> dict[str, Any]:
    return {
        "success": True,
        "cluster_id": known.cluster_id,
        "status": known.status,
        "tunnel_url": known.tunnel_url,
        "api_server": known.api_server,
    }
