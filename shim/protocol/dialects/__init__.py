"""Legacy HTTP dialects: pure translation of the calls of one generation (docs/reference/protocol.md#1-legacy-side).

A dialect is one module of this package with

    NAME: str
    ROUTES: tuple[Route, ...]
    def parse(operation: str, call: Call) -> AgentCall      # raises errors.AgentError
    def render(operation: str, outcome: Outcome, call: Call) -> Reply

Dialects are found by their module name, so a new dialect is one new file. The module `_shared` is no
dialect: it has the code that dialects share.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import msgspec

from shim.core.agent_calls import AgentCall, Failed, Outcome
from shim.core.bounds import MAX_ID_BYTES
from shim.errors import AgentError


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
    names = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in names)


def error_reply(failed: Failed) -> Reply:
    """Return an error in the shape of every legacy reply. A conflict has the ids in both places that agents read."""
    body: dict[str, Any] = {"success": False, "error": failed.error}
    if failed.cluster_id:
        body |= {"cluster_id": failed.cluster_id, "cluster": {"id": failed.cluster_id}}
    return Reply(failed.status, body, failed.retry_after_s)


class Match(msgspec.Struct, frozen=True):
    """A routed request. `params` has the ids of the path; `ident` is the one of them that names the agent, or empty."""

    dialect: Dialect
    route: Route
    params: dict[str, str]
    ident: str = ""


class _Path(msgspec.Struct, frozen=True):
    """The path of one or more routes: its segments, None for an id, and the routes by method."""

    segments: tuple[str | None, ...]
    names: tuple[str, ...]
    routes: dict[str, tuple[Dialect, Route]] = msgspec.field(default_factory=dict)

    def ids_in(self, parts: list[str]) -> list[str] | None:
        """Return the ids, still encoded, of a request path that has this form, else None."""
        if any(own is not None and own != part for own, part in zip(self.segments, parts, strict=True)):
            return None
        return [part for own, part in zip(self.segments, parts, strict=True) if own is None]


class Router:
    """Routes of all dialects by the number of their path segments. Literal segments take precedence over ids."""

    def __init__(self, dialects: Iterable[Dialect], base_path: str = "") -> None:
        self._base = [part for part in base_path.split("/") if part]
        paths: dict[tuple[str | None, ...], _Path] = {}
        for dialect in dialects:
            for route in dialect.ROUTES:
                parts = route.pattern.strip("/").split("/")
                segments = tuple(None if part.startswith("{") else part for part in parts)
                names = tuple(part[1:-1] for part in parts if part.startswith("{"))
                path = paths.setdefault(segments, _Path(segments, names))
                if route.method in path.routes:
                    raise ValueError(f"two dialects claim {route.method} {route.pattern}")
                path.routes[route.method] = dialect, route
        self._paths: dict[int, list[_Path]] = {}
        for path in sorted(paths.values(), key=lambda each: [segment is None for segment in each.segments]):
            self._paths.setdefault(len(path.segments), []).append(path)

    def match(self, method: str, raw_path: str) -> Match:
        """Route a request by its raw path, still encoded and without the query.

        Leading slashes are folded into one. The path is accepted with and without the configured base path, and with a
        double slash after it. Raises `AgentError` with 404 (no such route), 405 (other methods only, listed in `allow`)
        or 400 (an id that is not 1-256 printable bytes without `/`).
        """
        path, raw_ids = self._find(raw_path)
        found = path.routes.get(method)
        if found is None:
            raise AgentError(405, "method not allowed", allow=tuple(sorted(path.routes)))
        params = {name: decode_id(raw) for name, raw in zip(path.names, raw_ids, strict=True)}
        return Match(*found, params, params.get("cluster_id") or params.get("agent_id", ""))

    def _find(self, raw_path: str) -> tuple[_Path, list[str]]:
        parts = raw_path.lstrip("/").split("/")
        candidates = [parts]
        base = self._base
        if base and parts[: len(base)] == base:
            # Agents build URLs by concatenation: a base URL that ends in a slash gives `base//api`.
            candidates.insert(0, "/".join(parts[len(base) :]).lstrip("/").split("/"))
        for candidate in candidates:
            for path in self._paths.get(len(candidate), ()):
                ids = path.ids_in(candidate)
                if ids is not None:
                    return path, ids
        raise AgentError(404, "no such endpoint")


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
