"""Access control of the admin port: origin checks against foreign pages, and the admin token if one is configured."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from enum import Enum
from ipaddress import ip_address

from aiohttp import hdrs, web

from shim.config.settings import Admin, is_loopback
from shim.errors import OperatorError
from shim.protocol.http import bearer, host_name

_SEC_FETCH_SITE = "Sec-Fetch-Site"
_OWN_SITE = frozenset({"same-origin", "none"})


class Access(Enum):
    """Levels of protection of a route."""

    OPEN = "open"  # health and metrics: for probes and Prometheus
    SHELL = "shell"  # the page's files, without any data
    DATA = "data"
    CHANGE = "change"


class Guard:
    """Access check for requests. `token` reads the admin token; it is called only if `admin.token_file` is set.

    The token is accepted in the Authorization header only, never in a cookie: browsers send a cookie of 127.0.0.1 to
    every port of it.
    """

    def __init__(self, admin: Admin, token: Callable[[], str]) -> None:
        self._token = token
        self._hosts = {host.lower() for host in (*admin.allowed_hosts, *admin.hosts)}
        self.required = bool(admin.token_file)

    def check(self, request: web.Request, access: Access) -> None:
        """Return if the request is allowed. Raises `OperatorError` with 401, 403 or 503."""
        if access is Access.OPEN:
            return
        host = request.headers.get(hdrs.HOST, "")
        # With DNS rebinding a foreign name resolves to our address, and the browser takes its page as our origin. So
        # the Host header must be one of our own names.
        if not self._is_ours(host_name(host)):
            raise OperatorError(403, "the Host header names another host: see admin.allowed_hosts")
        if access is Access.SHELL:
            return
        if not _same_origin(request, host):
            raise OperatorError(403, "requests of other sites' pages are refused")
        if access is Access.CHANGE and not self.required:
            raise OperatorError(403, "nothing may be changed here: that needs admin.token_file in the configuration")
        if self.required:
            self._authorize(request)

    def _authorize(self, request: web.Request) -> None:
        given = bearer(request.headers.get(hdrs.AUTHORIZATION))
        if not given:
            raise OperatorError(401, "the admin token is required: Authorization: Bearer …")
        if not hmac.compare_digest(given.encode(), self._token().encode()):
            raise OperatorError(401, "the admin token is not accepted")

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name in self._hosts:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True  # an address is not resolved by DNS, so it cannot be rebound


def _same_origin(request: web.Request, host: str) -> bool:
    """Return True unless the request comes from another site's page. Only browsers send the headers that show it."""
    if request.headers.get(_SEC_FETCH_SITE, "none") not in _OWN_SITE:
        return False
    origin = request.headers.get(hdrs.ORIGIN)
    return origin is None or origin.lower().partition("://")[2] == host.lower()
