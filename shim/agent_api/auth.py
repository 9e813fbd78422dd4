"""Access checks by headers: browsers and foreign host names are rejected, tokens are compared.

See docs/reference/protocol.md#1-legacy-side.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from urllib.parse import parse_qs, urlsplit

from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage
from multidict import istr

from shim.config.settings import Listen
from shim.errors import AgentError, ConfigError
from shim.hosts import is_loopback
from shim.protocol.http import bearer, host_name

_SEC_FETCH_SITE = istr("Sec-Fetch-Site")
_REMEMBERED_HOSTS = 256
RETRY_AFTER_S = 5  # a changed token file is noticed within this time


class Guard:
    """Access check of requests by their headers.

    `token()` returns the upstream token; `token` is None if agents bring tokens of their own.
    """

    def __init__(self, listen: Listen, token: Callable[[], str] | None) -> None:
        on_loopback = listen.on_loopback
        self._token = token
        self._required = listen.auth == "required" or (listen.auth == "auto" and not on_loopback)
        self._any_host = not on_loopback and not listen.allowed_hosts
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

    def authorize(self, token: str) -> None:
        """Raise `AgentError` 401 for a Bearer token that is not accepted; a missing token is an empty string.

        Raises `AgentError` 503 while the file with the expected token cannot be read.
        """
        if self._token is None:
            if not token:
                raise AgentError(401, "a token is required")
        elif self._required:
            try:
                expected = self._token()
            except ConfigError:  # the log says why, for the link cannot be dialled either
                raise AgentError(503, "the shim cannot read its own token", retry_after_s=RETRY_AFTER_S) from None
            # While the upstream token is not available yet it is empty, and must not equal the empty token of a call.
            if not expected or not hmac.compare_digest(token.encode(), expected.encode()):
                raise AgentError(401, "the token is not accepted")

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
