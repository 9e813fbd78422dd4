"""The fast path: answer a complete request inside `data_received`, without a task or a request object.

Most requests are heartbeats, each alone on its connection and complete in one segment. Every other request falls
through to `shim.agent_api.server` before any state has changed.
"""

from __future__ import annotations

import logging

from aiohttp import hdrs
from aiohttp.http import HttpVersion11
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from shim.agent_api.auth import Guard
from shim.agent_api.connection import AgentConnection, ServerContext
from shim.agent_api.refused_calls import route_of
from shim.agent_api.request_body import InFlight, decode_body, is_shallow, peek
from shim.agent_api.response_writer import REQUEST_ID, RequestMetrics
from shim.agent_api.responses import encode_body
from shim.agent_api.routing import RouteCache, session_in
from shim.core.agent_calls import Failed
from shim.errors import AgentError
from shim.ports import Fallback, Forwarder, Pending
from shim.protocol.dialects import Call, Match, error_reply

_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_POST})
OPERATIONS = frozenset({"heartbeat", "poll", "tunnel_poll", "tunnel_info", "health"})

logger = logging.getLogger(__name__)


class SyncRequestHandler:
    """Handler of requests that can be answered synchronously."""

    def __init__(
        self,
        server_context: ServerContext,
        guard: Guard,
        routes: RouteCache,
        in_flight: InFlight,
        counts: RequestMetrics,
        fallback: Fallback | None,
        forwarder: Forwarder | None = None,
    ) -> None:
        self._server_context = server_context
        self._guard = guard
        self._routes = routes
        self._in_flight = in_flight
        self._counts = counts
        self._fallback = fallback
        self._forwarder = forwarder

    def answer(
        self, connection: AgentConnection, request: RawRequestMessage, body: StreamReader, started_s: float
    ) -> bytes | Pending | None:
        """Return the whole response to a request, or None if the request must take the normal path. Never raises.

        The caller guarantees that the request is complete and the only one on its connection, and that it keeps the
        connection open. `started_s` is the loop time of its first byte. A `Pending` means that another replica will
        answer.
        """
        match, client, headers = self._admitted(connection, request), connection.client, request.headers
        if match is None or client is None:
            return None
        data = peek(body)
        if len(data) > self._server_context.listen.max_body_bytes:
            return None
        if self._forwarder is not None and not match.route.open and self._forwarder.elsewhere(client.token):
            return self._forward(self._forwarder, connection, request, match, data)
        try:
            decoded = decode_body(data, _leave_fast_path) if match.route.method == hdrs.METH_POST else None
            call = Call(match.params, decoded, headers.get(hdrs.USER_AGENT, ""), is_shallow(data), len(data))
            agent_call = match.dialect.parse(match.route.operation, call)
        except AgentError:
            return None
        try:
            answer = self._server_context.agent_service.try_call_sync(client, agent_call, started_s)
            if answer is None:
                return None
            reply = match.dialect.render(match.route.operation, answer.outcome, call)
        except Exception:
            logger.exception("a defect while serving %s", (match.dialect.NAME, match.route.operation))
            self._server_context.metrics.internal_errors.labels("frontend").inc()
            reply = error_reply(Failed(500, "internal error"))
        more = "" if reply.retry_after_s is None else f"Retry-After: {reply.retry_after_s}\r\n"
        request_id = self._server_context.replies.request_id(headers.get(REQUEST_ID))
        encoded = None if reply.body is None else encode_body(reply.body)
        response = self._server_context.replies.response(reply.status, encoded, request_id, more)
        self._counts.count(match, reply.status, connection.now_s() - started_s)
        if reply.status >= 400:
            route = route_of(request.method, request.path, match)
            self._server_context.refused.note(connection.now_s(), reply.status, route, reply.body)
        return response

    def _admitted(self, connection: AgentConnection, request: RawRequestMessage) -> Match | None:
        """Return the route of a request whose head permits the fast path, else None.

        Only an identical repetition qualifies: the target was routed before, and the token equals the connection's
        previous one.
        """
        match = self._routes.cached_match(request.method, request.path)
        headers = request.headers
        if match is None or match.route.operation not in OPERATIONS or request.version != HttpVersion11:
            return None
        if request.method not in _METHODS or hdrs.EXPECT in headers or hdrs.CONTENT_ENCODING in headers:
            return None
        if self._guard.check(headers) is not None or self._elsewhere():
            return None
        client = connection.client
        if client is None or headers.get(hdrs.AUTHORIZATION) != connection.authorization:
            return None
        if not match.route.open and self._guard.authorize(client.token) is not None:
            return None
        has_room = self._in_flight.has_room(self._in_flight.key(client.token, session_in(match)))
        return match if has_room else None

    def _forward(
        self,
        forwarder: Forwarder,
        connection: AgentConnection,
        request: RawRequestMessage,
        match: Match,
        body: bytes,
    ) -> Pending | None:
        """Forward the unchanged bytes of a heartbeat to the replica that owns the agent's shard.

        Returns None if that is not possible synchronously.
        """
        client = connection.client
        if client is None or match.route.operation != "heartbeat" or request.compression or request.chunked:
            return None
        raw = connection.raw_request
        if not raw:
            return None

        def answered(reply: bytes | None) -> None:
            connection.answer_late(reply or self._without_owner(forwarder, match, request, body))

        return forwarder.try_call_sync(client.token, raw, answered)

    def _without_owner(self, forwarder: Forwarder, match: Match, request: RawRequestMessage, body: bytes) -> bytes:
        """Return the reply to a heartbeat whose owning replica did not answer."""
        try:
            decoded = decode_body(body, lambda: None)  # invalid characters are counted by the owning replica
            call = Call(match.params, decoded, request.headers.get(hdrs.USER_AGENT, ""), is_shallow(body))
            agent_call = match.dialect.parse(match.route.operation, call)
        except AgentError as error:
            return self._server_context.replies.error(error.status, str(error))
        outcome = forwarder.without_owner(agent_call)
        reply = match.dialect.render(match.route.operation, outcome, call)
        encoded = None if reply.body is None else encode_body(reply.body)
        more = "" if reply.retry_after_s is None else f"Retry-After: {reply.retry_after_s}\r\n"
        request_id = self._server_context.replies.request_id(request.headers.get(REQUEST_ID))
        return self._server_context.replies.response(reply.status, encoded, request_id, more)

    def _elsewhere(self) -> bool:
        """Return True if calls may have to go by the vendor's HTTP API."""
        return self._fallback is not None and (self._fallback.handles_all() or self._fallback.handles_some())


def _leave_fast_path() -> None:
    """Leave the fast path, because the body is not UTF-8: the normal path counts that."""
    raise AgentError(400, "the body is not valid UTF-8")
