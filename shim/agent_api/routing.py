"""Routing of requests, with a cache of the targets that were seen before."""

from __future__ import annotations

from aiohttp import hdrs, web

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

    def cached_match(self, method: str, target: str) -> Match | None:
        """Return the route of a target that was routed before, or None."""
        return self._matches.get((method, target))

    def match(self, request: web.BaseRequest) -> Match:
        """Return the route of a request. Raises `AgentError` 400, 404 or 405."""
        key = (request.method, request.raw_path)
        match = self._matches.get(key)
        if match is None:
            match = self._find(request)
            if len(self._matches) >= _REMEMBERED_TARGETS:
                self._matches.clear()
            self._matches[key] = match
        return match

    def _find(self, request: web.BaseRequest) -> Match:
        if request.method == hdrs.METH_CONNECT:
            raise BodyRejected(405, "method not allowed")  # after CONNECT aiohttp takes all further bytes for a body
        path = _path_of(request)
        if request.method == hdrs.METH_HEAD:
            match = self._router.match(hdrs.METH_GET, path)
            if not match.route.open:
                raise AgentError(405, "method not allowed")  # a HEAD of a poll would fetch commands and not return them
            return match
        return self._router.match(request.method, path)

    def allowed(self, request: web.BaseRequest) -> list[str]:
        """Return the methods that the request's target supports."""
        allowed = []
        for method in (hdrs.METH_GET, hdrs.METH_POST):
            try:
                match = self._router.match(method, _path_of(request))
            except AgentError:
                continue
            allowed += [method, hdrs.METH_HEAD] if match.route.open else [method]
        return allowed


def _path_of(request: web.BaseRequest) -> str:
    """Return the raw path without the query. Raises `AgentError` 400 if it is not UTF-8."""
    target = request.raw_path
    path = target.partition("?")[0].partition("#")[0] if target.startswith("/") else request.rel_url.raw_path
    try:
        path.encode()
    except UnicodeEncodeError:
        raise AgentError(400, "the path is not valid UTF-8") from None
    return path


def session_in(match: Match) -> str:
    """Return the agent's id in the path of a route, or an empty string."""
    return match.params.get("cluster_id") or match.params.get("agent_id", "")
