"""Routing of requests, with a cache of the targets that were seen before."""

from __future__ import annotations

from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage

from shim.agent_api.request_body import BodyRejected
from shim.errors import AgentError
from shim.protocol.dialects import Match, Router

_REMEMBERED_TARGETS = 4096


class RouteCache:
    """A `Router` with a bounded cache."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._matches: dict[tuple[str, str], Match] = {}

    def __len__(self) -> int:
        """Return the number of cached targets."""
        return len(self._matches)

    def match(self, message: RawRequestMessage) -> Match:
        """Return the route of a request. Raises `AgentError` 400, 404 or 405."""
        key = (message.method, message.path)
        match = self._matches.get(key)
        if match is None:
            match = self._find(message)
            if len(self._matches) >= _REMEMBERED_TARGETS:
                self._matches.clear()
            self._matches[key] = match
        return match

    def _find(self, message: RawRequestMessage) -> Match:
        if message.method == hdrs.METH_CONNECT:
            raise BodyRejected(405, "method not allowed")  # after CONNECT aiohttp takes all further bytes for a body
        path = _path_of(message)
        if message.method == hdrs.METH_HEAD:
            match = self._router.match(hdrs.METH_GET, path)
            if not match.route.open:
                # A HEAD of a poll would fetch commands and not return them.
                raise AgentError(405, "method not allowed", allow=(match.route.method,))
            return match
        return self._router.match(message.method, path)

    def allowed(self, error: AgentError, message: RawRequestMessage) -> str:
        """Return the `Allow` header for a 405: the methods of the target's route, and HEAD if the route is open."""
        methods = list(error.allow)
        if hdrs.METH_GET in methods and self._router.match(hdrs.METH_GET, _path_of(message)).route.open:
            methods.insert(methods.index(hdrs.METH_GET) + 1, hdrs.METH_HEAD)
        return ", ".join(methods)


def _path_of(message: RawRequestMessage) -> str:
    """Return the raw path without the query. Raises `AgentError` 400 if it is not UTF-8."""
    target = message.path
    path = target.partition("?")[0].partition("#")[0] if target.startswith("/") else message.url.raw_path
    try:
        path.encode()
    except UnicodeEncodeError:
        raise AgentError(400, "the path is not valid UTF-8") from None
    return path
