"""Who may see and do what on the admin port: no foreign pages, no foreign names, the admin token where one is set."""

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
    """What a route gives away."""

    OPEN = "open"  # health and metrics: for probes and Prometheus
    SHELL = "shell"  # the page without any data
    DATA = "data"
    CHANGE = "change"


class Guard:
    """Checks requests. `token` reads the admin token; it is called only where `admin.token_file` is set.

    The token comes in the Authorization header only, never in a cookie: a cookie of 127.0.0.1 goes to every port of it.
    """

    def __init__(self, admin: Admin, token: Callable[[], str]) -> None:
        self._token = token
        self._hosts = {host.lower() for host in (*admin.allowed_hosts, *admin.hosts)}
        self.required = bool(admin.token_file)

    def check(self, request: web.Request, access: Access) -> None:
        """Let a request pass, or raise `OperatorError` with 401, 403 or 503."""
        if access is Access.OPEN:
            return
        host = request.headers.get(hdrs.HOST, "")
        # A page of a foreign name that resolves to us (DNS rebinding) is of our origin for the browser.
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
        return True  # an address was not looked up: nobody can have made it point here


def _same_origin(request: web.Request, host: str) -> bool:
    """Browsers say where a request comes from; other clients say nothing."""
    if request.headers.get(_SEC_FETCH_SITE, "none") not in _OWN_SITE:
        return False
    origin = request.headers.get(hdrs.ORIGIN)
    return origin is None or origin.lower().partition("://")[2] == host.lower()
