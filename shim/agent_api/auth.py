"""Checks by headers, whatever the token: browsers and foreign host names are rejected; handshakes are recognised.

See docs/reference/protocol.md#1-legacy-side.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage
from multidict import istr

from shim.config.settings import Listen
from shim.errors import AgentError
from shim.hosts import is_loopback
from shim.protocol.http import bearer, host_name

_SEC_FETCH_SITE = istr("Sec-Fetch-Site")
_REMEMBERED_HOSTS = 256


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
    """Return the token in the header or else in the query of a handshake, or an empty string."""
    found = bearer(message.headers.get(hdrs.AUTHORIZATION) or "")
    if found:
        return found
    query = parse_qs(urlsplit(message.path).query, encoding="utf-8", errors="surrogateescape", max_num_fields=64)
    return query.get("token", [""])[0]
