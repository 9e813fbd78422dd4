"""Admission of a request by its head: its sender, its route, and the ids in its path.

Rules: docs/reference/protocol.md#1-legacy-side. Tokens are compared by `RequestHandler`, for each request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

import msgspec
from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage
from multidict import istr
from yarl import URL

from shim.agent_api.request_body import BodyRejected
from shim.config.settings import Listen
from shim.errors import AgentError
from shim.hosts import is_loopback
from shim.protocol.dialects import Dialect, Match, Route, _shared
from shim.protocol.http import bearer, host_name

_SEC_FETCH_SITE = istr("Sec-Fetch-Site")
_REMEMBERED_HOSTS = 256
_REMEMBERED_TARGETS = 4096


class Guard:
    """Access check of requests by their headers, whatever their token."""

    def __init__(self, listen: Listen) -> None:
        self._any_host = not listen.on_loopback and not listen.allowed_hosts
        self._hosts = {host.lower() for host in (*listen.allowed_hosts, *listen.hosts)}
        self._known: dict[str, bool] = {}

    def check(self, headers: Mapping[str, str]) -> None:
        """Reject requests of browsers (CSRF) and requests to a foreign host name (DNS rebinding).

        A browser sends `Origin` or `Sec-Fetch-Site` with every request that a web page can cause. `Sec-Fetch-Mode` is
        no evidence of a browser: the `fetch` of Node.js sends it as well. Raises `AgentError` 403.
        """
        if hdrs.ORIGIN in headers or _SEC_FETCH_SITE in headers:
            raise AgentError(403, "requests of browsers are refused")
        if not self._any_host:
            host = headers.get(hdrs.HOST)
            if host is not None and not (self._known.get(host) or self._is_ours(host)):
                raise AgentError(403, "the Host header names another host")

    def _is_ours(self, host: str) -> bool:
        known = self._known.get(host)
        if known is None:
            if len(self._known) >= _REMEMBERED_HOSTS:
                self._known.clear()
            known = self._known[host] = self._matches(host)
        return known

    def _matches(self, host: str) -> bool:
        name = host_name(host)
        return is_loopback(name) or name in self._hosts


def is_handshake(message: RawRequestMessage) -> bool:
    """Return True if a request asks for a WebSocket."""
    return message.method == hdrs.METH_GET and message.headers.get(hdrs.UPGRADE, "").strip().lower() == "websocket"


def token_of(message: RawRequestMessage) -> str:
    """Return the token in the header or else in the query of a handshake, or an empty string.

    Raises `AgentError` 400 for a query that is malformed or has too many fields.
    """
    found = bearer(message.headers.get(hdrs.AUTHORIZATION) or "")
    if found:
        return found
    try:
        query = parse_qs(urlsplit(message.path).query, encoding="utf-8", errors="surrogateescape", max_num_fields=64)
    except ValueError:
        raise AgentError(400, "malformed query") from None
    return query.get("token", [""])[0]


# --- routes -----------------------------------------------------------------------------------------------------------


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


def decode_id(raw: str) -> str:
    """Decode a path id once and check it. Raises `AgentError` 400 as `valid_id` does."""
    if "%" not in raw:
        return _shared.valid_id(raw)
    # aiohttp may pass undecodable bytes of the path as surrogates. They become invalid UTF-8 again here.
    return _shared.valid_id(unquote_to_bytes(raw.encode("utf-8", "surrogatepass")))


class RouteCache(dict[tuple[str, str], Match]):
    """Routes by (method, target), as far as these were seen lately. A lookup routes a new target.

    A lookup raises `AgentError` 400, 404 or 405.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self._router = router

    def __missing__(self, key: tuple[str, str]) -> Match:
        match = self._find(*key)
        if len(self) >= _REMEMBERED_TARGETS:
            self.clear()
        self[key] = match
        return match

    def _find(self, method: str, target: str) -> Match:
        if method == hdrs.METH_CONNECT:
            raise BodyRejected(405, "method not allowed")  # after CONNECT aiohttp takes all further bytes for a body
        path = _path_of(target)
        if method == hdrs.METH_HEAD:
            match = self._router.match(hdrs.METH_GET, path)
            if not match.route.open:
                # A HEAD of a poll would fetch commands and not return them.
                raise AgentError(405, "method not allowed", allow=(match.route.method,))
            return match
        return self._router.match(method, path)

    def allowed(self, error: AgentError, target: str) -> str:
        """Return the `Allow` header for a 405: the methods of the target's route, and HEAD if the route is open."""
        methods = list(error.allow)
        if hdrs.METH_GET in methods and self._router.match(hdrs.METH_GET, _path_of(target)).route.open:
            methods.insert(methods.index(hdrs.METH_GET) + 1, hdrs.METH_HEAD)
        return ", ".join(methods)


def _path_of(target: str) -> str:
    """Return the raw path without the query. Raises `AgentError` 400 if it is not UTF-8."""
    path = target.partition("?")[0].partition("#")[0] if target.startswith("/") else URL(target, encoded=True).raw_path
    try:
        path.encode()
    except UnicodeEncodeError:
        raise AgentError(400, "the path is not valid UTF-8") from None
    return path
