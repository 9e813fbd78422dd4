"""Legacy HTTP dialects: pure translation of one generation's calls (protocol.md §1).

A dialect is one module of this package with

    NAME: str
    ROUTES: tuple[Route, ...]
    def parse(operation: str, call: Call) -> AgentCall      # raises errors.AgentError
    def render(operation: str, outcome: Outcome, call: Call) -> Reply

and is found by its name, so that a new dialect is one new file. What all of them share stands here.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from shim.core.calls import Accepted, AgentCall, Commands, Failed, Healthy, Outcome, Registered, TunnelInfo, TunnelState
from shim.errors import AgentError

MAX_ID_BYTES = 256


@dataclass(frozen=True, slots=True)
class Call:
    """One legacy request, read and decoded: `params` are the path's ids, `body` the JSON value (`None` if empty)."""

    params: Mapping[str, str]
    body: Any = None
    user_agent: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back: a status and a JSON object, or no body at all (`None`)."""

    status: int
    body: dict[str, Any] | None = None
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One legacy route: `pattern` has `{name}` segments; `operation` is what `parse` and `render` are given.

    `large` marks bodies that may be up to `listen.max_status_body_bytes`; `open` needs no Authorization header.
    """

    method: str
    pattern: str
    operation: str
    large: bool = False
    open: bool = False


class Dialect(Protocol):
    """What a dialect module offers."""

    NAME: str
    ROUTES: tuple[Route, ...]

    def parse(self, operation: str, call: Call) -> AgentCall:
        """Turn a request into a call. Raises `AgentError` (400) for what cannot be understood."""

    def render(self, operation: str, outcome: Outcome, call: Call) -> Reply:
        """Turn an outcome, `Failed` included, into this generation's reply."""


def load() -> tuple[Dialect, ...]:
    """All dialects of this package, in the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in names)  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Match:
    """A routed request."""

    dialect: Dialect
    route: Route
    params: dict[str, str]


@dataclass(slots=True)
class _Node:
    """One path segment of the routing tree; a `{name}` segment is stored under `None`."""

    children: dict[str | None, _Node] = field(default_factory=dict)
    routes: dict[str, tuple[Dialect, Route, tuple[str, ...]]] = field(default_factory=dict)


class Router:
    """Routes of all dialects as a tree of path segments; literal segments win over ids."""

    def __init__(self, dialects: Iterable[Dialect], base_path: str = "") -> None:
        self._root = _Node()
        self._base = [part for part in base_path.split("/") if part]
        for dialect in dialects:
            for route in dialect.ROUTES:
                self._add(dialect, route)

    def _add(self, dialect: Dialect, route: Route) -> None:
        node, names = self._root, []
        for part in route.pattern.strip("/").split("/"):
            name = part[1:-1] if part.startswith("{") else None
            if name:
                names.append(name)
            node = node.children.setdefault(None if name else part, _Node())
        if route.method in node.routes:
            raise ValueError(f"two dialects claim {route.method} {route.pattern}")
        node.routes[route.method] = (dialect, route, tuple(names))

    def match(self, method: str, raw_path: str) -> Match:
        """Route a request by its raw, still encoded path without the query.

        Leading slashes are folded into one and the base path, if configured, is taken off. Raises `AgentError` with
        404 (no such route), 405 (another method) or 400 (an id that is not 1-256 printable bytes without `/`).
        """
        parts = raw_path.lstrip("/").split("/")
        base = self._base
        if base and parts[: len(base)] == base:
            # a configured base with a trailing slash gives `base//api`
            parts = "/".join(parts[len(base) :]).lstrip("/").split("/")
        found = self._walk(self._root, parts, 0, [])
        if found is None:
            raise AgentError(404, "no such endpoint")
        node, raw_ids = found
        entry = node.routes.get(method)
        if entry is None:
            raise AgentError(405, "method not allowed")
        dialect, route, names = entry
        return Match(dialect, route, {name: decode_id(raw) for name, raw in zip(names, raw_ids, strict=True)})

    def _walk(self, node: _Node, parts: list[str], at: int, ids: list[str]) -> tuple[_Node, list[str]] | None:
        if at == len(parts):
            return (node, ids) if node.routes else None
        literal = node.children.get(parts[at])
        if literal is not None:
            found = self._walk(literal, parts, at + 1, ids)
            if found is not None:
                return found
        wildcard = node.children.get(None)
        return self._walk(wildcard, parts, at + 1, [*ids, parts[at]]) if wildcard is not None else None


_PLAIN_ID = re.compile(r"[A-Za-z0-9_\-]{1,256}", re.ASCII)


def decode_id(raw: str) -> str:
    """Decode a path id once. Raises `AgentError` 400 unless it is 1-256 printable bytes without `/`, not `.` or `..`."""
    if _PLAIN_ID.fullmatch(raw):
        return raw
    return valid_id(unquote_to_bytes(raw))


def valid_id(data: bytes | str) -> str:
    """Check an id from a path or a body (protocol.md §1); raises `AgentError` 400."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise AgentError(400, "invalid id") from None
    if not 1 <= len(raw) <= MAX_ID_BYTES or "/" in text or text in (".", "..") or not text.isprintable():
        raise AgentError(400, "invalid id")
    return text


def render_common(outcome: Outcome, call: Call) -> Reply:
    """The superset replies that every generation decodes (protocol.md §1.1-1.5)."""
    match outcome:
        case Registered():
            return Reply(200, registered_body(outcome))
        case Accepted():
            # Go's client drops its connection when a success it does not read has a body (wire-facts §1.0).
            return Reply(204) if call.user_agent.startswith("Go-http-client") else Reply(200, {"success": True})
        case Commands():
            return Reply(200, commands_body(outcome))
        case TunnelState():
            return Reply(200, outcome.payload or {"status": "IDLE", "poll_frequency": outcome.poll_frequency_s})
        case TunnelInfo():
            known = outcome.registered
            return Reply(
                200,
                {
                    "success": True,
                    "cluster_id": known.cluster_id,
                    "status": known.status,
                    "tunnel_url": known.tunnel_url,
                    "api_server": known.api_server,
                },
            )
        case Healthy():
            return Reply(200, {"status": "healthy"})
        case Failed():
            return error_reply(outcome)


def error_reply(failed: Failed) -> Reply:
    """The error shape of every legacy reply; a conflict carries the ids in both places where agents look."""
    body: dict[str, Any] = {"success": False, "error": failed.error}
    if failed.cluster_id:
        body |= {"cluster_id": failed.cluster_id, "cluster": {"id": failed.cluster_id}}
    return Reply(failed.status, body, failed.retry_after_s)


def registered_body(known: Registered) -> dict[str, Any]:
    """One register reply that satisfies all generations (wire-facts §1.1); `token` and gateway are never in it."""
    text = "registered (cached)" if known.cached else "registered"
    cluster: dict[str, Any] = {
        "id": known.cluster_id,
        "uuid": known.cluster_uuid,
        "name": known.name,
        "status": known.status,
        "agent_id": known.agent_id,
    }
    data: dict[str, Any] = {
        "cluster_id": known.cluster_id,
        "status": known.status,
        "tunnel_url": known.tunnel_url,
    }
    if known.workspace_id is not None:
        cluster["workspace_id"] = known.workspace_id
    if known.registered_at is not None:
        cluster["registered_at"] = data["registered_at"] = known.registered_at
    return {
        "success": True,
        "message": text,
        "cluster_id": known.cluster_id,
        "cluster_uuid": known.cluster_uuid,
        "name": known.name,
        "status": known.status,
        "tunnel_url": known.tunnel_url,
        "api_server": known.api_server,
        "cluster": cluster,
        "data": data,
    }


def commands_body(answer: Commands) -> dict[str, Any]:
    """The superset poll reply of protocol.md §1.3."""
    return {
        "success": True,
        "commands": [
            {"id": c.id, "type": c.type, "payload": c.payload, "created_at": c.created_at} for c in answer.commands
        ],
        "status": "IDLE",
        "poll_frequency": answer.poll_frequency_s,
    }


def body_object(call: Call) -> dict[str, Any]:
    """The request's JSON object. Raises `AgentError` 400 if it is something else."""
    if not isinstance(call.body, dict):
        raise AgentError(400, "the body must be a JSON object")
    return call.body


def text(value: Any) -> str:
    """A leniently read string field: numbers become text, anything else that is no string becomes empty."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
