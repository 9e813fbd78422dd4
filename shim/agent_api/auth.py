"""Access checks by headers: browsers and foreign host names are rejected, tokens are compared.

See docs/reference/protocol.md#1-legacy-side.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping

from aiohttp import hdrs
from multidict import istr

from shim.config.settings import Listen, is_loopback
from shim.core.agent_calls import Failed
from shim.protocol.http import bearer, host_name

__all__ = ["Guard", "bearer"]

_SEC_FETCH_SITE = istr("Sec-Fetch-Site")
_REMEMBERED_HOSTS = 256


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

    def check(self, headers: Mapping[str, str]) -> Failed | None:
        """Return a 403 for browsers (CSRF) and for requests to a foreign host name (DNS rebinding), else None.

        A browser sends `Origin` or `Sec-Fetch-Site` with every request that a web page can cause. `Sec-Fetch-Mode` is
        no evidence of a browser: the `fetch` of Node.js sends it as well.
        """
        if hdrs.ORIGIN in headers or _SEC_FETCH_SITE in headers:
            return Failed(403, "requests of browsers are refused")
        if not self._any_host:
            host = headers.get(hdrs.HOST)
            if host is not None and not self._is_ours(host):
                return Failed(403, "the Host header names another host")
        return None

    def authorize(self, token: str) -> Failed | None:
        """Return a 401 for a Bearer token that is not accepted, else None; a missing token is an empty string."""
        if self._token is None:
            return None if token else Failed(401, "a token is required")
        if not self._required:
            return None
        expected = self._token()
        # While the upstream token is not available yet it is empty, and must not equal the empty token of a call.
        if expected and hmac.compare_digest(token.encode(), expected.encode()):
            return None
        return Failed(401, "the token is not accepted")

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
