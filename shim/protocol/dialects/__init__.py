"""Legacy HTTP dialects: pure translation of the calls of one generation (docs/reference/protocol.md#1-legacy-side).

A dialect is one module of this package with

    NAME: str
    ROUTES: tuple[Route, ...]
    def parse(operation: str, call: Call) -> AgentCall      # raises errors.AgentError
    def render(operation: str, outcome: Outcome, call: Call) -> Reply

Dialects are found by their module name, so a new dialect is one new file. Modules with a leading underscore are no
dialects: `_requests` and `_replies` have the code that dialects share.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import msgspec

from shim.core.agent_calls import AgentCall, Failed, Outcome
from shim.core.bounds import MAX_ID_BYTES
from shim.errors import AgentError

MAX_DEPTH = 64
"""Levels of nested arrays and objects in a body: far more than agents send, far fewer than make an encoder fail."""


class Call(msgspec.Struct, frozen=True):
    """One decoded legacy request. `params` has the ids of the path, `body` the JSON value (`None` if empty).

    `size_bytes` is the size of the body after decompression. `shallow` is true if the body has too few brackets to be
    nested too deeply, so that the dialect need not check.
    """

    params: Mapping[str, str]
    body: Any = None
    user_agent: str = ""
    shallow: bool = False
    size_bytes: int = 0

    def __repr__(self) -> str:
        return f"Call({self.params!r}, user_agent={self.user_agent!r})"


class Reply(msgspec.Struct, frozen=True):
    """A reply: a status and a JSON object, or no body (`None`)."""

    status: int
    body: dict[str, Any] | None = None
    retry_after_s: int | None = None


class Route(msgspec.Struct, frozen=True):
    """One legacy route. `pattern` has `{name}` segments; `operation` is passed to `parse` and `render`.

    `large` allows bodies up to `listen.max_status_body_bytes`. `open` routes need no Authorization header.
    """

    method: str
    pattern: str
    operation: str
    large: bool = False
    open: bool = False


class Dialect(Protocol):
    """The interface of a dialect module."""

    NAME: str
    ROUTES: tuple[Route, ...]

    def parse(self, operation: str, call: Call) -> AgentCall:
        """Convert a request to a call. Raises `AgentError` (400) for a malformed request."""

    def render(self, operation: str, outcome: Outcome, call: Call) -> Reply:
        """Convert an outcome, `Failed` included, to this generation's reply."""


def load() -> tuple[Dialect, ...]:
    """Return all dialects of this package, ordered by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in names)


def error_reply(failed: Failed) -> Reply:
    """Return an error in the shape of every legacy reply. A conflict has the ids in both places that agents read."""
    body: dict[str, Any] = {"success": False, "error": failed.error}
    if failed.cluster_id:
        body |= {"cluster_id": failed.cluster_id, "cluster": {"id": failed.cluster_id}}
    return Reply(failed.status, body, failed.retry_after_s)


class Match(msgspec.Struct, frozen=True):
    """A routed request."""

    dialect: Dialect
    route: Route
    params: dict[str, str]


@dataclass(slots=True)
class _Node:
    """One path segment in the routing tree. A `{name}` segment is stored under `None`."""

    children: dict[str | None, _Node] = field(default_factory=dict)
    routes: dict[str, tuple[Dialect, Route, tuple[str, ...]]] = field(default_factory=dict)


class Router:
    """Routes of all dialects as a tree of path segments. Literal segments take precedence over ids."""

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
        """Route a request by its raw path, still encoded and without the query.

        Leading slashes are folded into one. The path is accepted with and without the configured base path, and with a
        double slash after it. Raises `AgentError` with 404 (no such route), 405 (other methods only, listed in `allow`)
        or 400 (an id that is not 1-256 printable bytes without `/`).
        """
        found = self._find(raw_path)
        if found is None:
            raise AgentError(404, "no such endpoint")
        node, raw_ids = found
        entry = node.routes.get(method)
        if entry is None:
            raise AgentError(405, "method not allowed", allow=tuple(sorted(node.routes)))
        dialect, route, names = entry
        return Match(dialect, route, {name: decode_id(raw) for name, raw in zip(names, raw_ids, strict=True)})

    def _find(self, raw_path: str) -> tuple[_Node, list[str]] | None:
        parts = raw_path.lstrip("/").split("/")
        base = self._base
        if base and parts[: len(base)] == base:
            # Agents build URLs by concatenation: a base URL that ends in a slash gives `base//api`.
            found = self._walk(self._root, "/".join(parts[len(base) :]).lstrip("/").split("/"), 0, [])
            if found is not None:
                return found
        return self._walk(self._root, parts, 0, [])

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
    """Decode a path id once and check it. Raises `AgentError` 400 as `valid_id` does."""
    if _PLAIN_ID.fullmatch(raw):
        return raw
    # aiohttp may pass undecodable bytes of the path as surrogates. They become invalid UTF-8 again here.
    return valid_id(unquote_to_bytes(raw.encode("utf-8", "surrogatepass")))


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
