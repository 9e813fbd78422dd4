"""The HTTP server for agents: listening, and the normal path of a request from its headers to the reply."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

from aiohttp import hdrs, web

from shim.agent_api.agent_websocket import AgentWebSocket, is_handshake, token_of
from shim.agent_api.auth import Guard, bearer
from shim.agent_api.connection import AgentConnection, ConnectionCount, RequestContext, ServerContext, SyncHandler
from shim.agent_api.content_coding import plain_body
from shim.agent_api.forwarding import forwarded, is_large, target_of
from shim.agent_api.refused_calls import RefusedCalls
from shim.agent_api.request_body import (
    BodyRejected,
    InFlight,
    decode_body,
    is_shallow,
    meet_expectation,
    read_body,
    stream_body,
)
from shim.agent_api.request_handler import SyncRequestHandler
from shim.agent_api.response_writer import RequestMetrics, ResponseWriter
from shim.agent_api.responses import ResponseBuilder, StaticHeaders, encode_body, no_static_headers
from shim.agent_api.routing import RouteCache, session_in
from shim.agent_api.tls import ServerTls
from shim.config.files import reason
from shim.config.settings import Listen
from shim.core.agent_calls import AgentCall, Failed, RegisterCall
from shim.core.bounds import MAX_LINE_BYTES
from shim.core.call_records import RecentCalls
from shim.errors import AgentError, StartError
from shim.http_connection import LINGER_S, Budget
from shim.listening import Listener, bind
from shim.metrics import Metrics
from shim.ports import AgentService, AgentWebSockets, Caller, CallResult, Fallback, Forwarder, Handshake, ProxyResponse
from shim.protocol.dialects import Call, Dialect, Match, Reply, Router, error_reply

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)


class ConnectionServer(web.Server):
    """aiohttp's `web.Server` with connections of type `AgentConnection`.

    `sync_handler` answers the requests that need no handler.
    """

    def __init__(
        self,
        handler: Handler,
        server_context: ServerContext,
        sync_handler: SyncHandler,
        make: Callable[..., AgentConnection],
        **options: Any,
    ) -> None:
        # aiohttp's default keeps a handler running after its agent has disconnected. A held poll would then take
        # commands that reach no agent.
        super().__init__(handler, handler_cancellation=True, **options)
        self._sync_handler = sync_handler
        self._server_context = server_context
        self._make = make
        self._numbers = itertools.count(1)

    def __call__(self) -> AgentConnection:
        return self._make(self, self._server_context, self._sync_handler, next(self._numbers), self._kwargs)


RECEIVE_BYTES = 32_768
"""Size of a connection's receive buffer in the kernel, and thereby of one read of the event loop."""
READ_BYTES = 65_536
"""Half of the bytes that aiohttp buffers of a body before it pauses reading."""


class AgentServer:
    """The HTTP server for agents. Call `start()` and `stop()` once each."""

    _section = "listen"

    def __init__(  # noqa: PLR0913 - the server's dependencies, passed once at start-up
        self,
        listen: Listen,
        agent_service: AgentService,
        dialects: Iterable[Dialect],
        metrics: Metrics,
        *,
        token: Callable[[], str] | None = None,
        static_headers: StaticHeaders = no_static_headers,
        fallback: Fallback | None = None,
        websockets: AgentWebSockets | None = None,
        max_message_bytes: int = 0,
        refused_calls: RecentCalls | None = None,
        forwarder: Forwarder | None = None,
    ) -> None:
        """Create a server that does not listen yet.

        `token()` returns the current upstream token; `token` is None if agents bring tokens of their own.
        `static_headers()` is added to every reply and must return the same mapping object until its content changes.
        `fallback` serves calls that go by the vendor's HTTP API. `refused_calls` counts rejected calls. `forwarder`
        sends calls to the replica that owns the agent's shard.
        """
        self._listen = listen
        self._forwarder = forwarder
        self._agent_service = agent_service
        self._fallback = fallback
        self._websockets = websockets
        self._max_message_bytes = max_message_bytes
        self._metrics = metrics
        self._replaced = metrics.invalid_characters.labels("agent").inc
        self._guard = self._make_guard(token)
        self._in_flight = InFlight(listen.max_in_flight_per_session, own_tokens=token is None)
        self._budget = Budget(2 * max(listen.max_status_body_bytes, listen.max_body_bytes))
        self._routes = RouteCache(Router(dialects, listen.base_path))
        self._server_context = ServerContext(
            listen,
            agent_service,
            metrics,
            ResponseBuilder(static_headers),
            self._budget,
            RefusedCalls(refused_calls or RecentCalls()),
            self._make_connection_count(),
        )
        counts = RequestMetrics(metrics)
        self._writer = ResponseWriter(self._server_context, counts)
        self._sync_handler = SyncRequestHandler(
            self._server_context, self._guard, self._routes, self._in_flight, counts, fallback, forwarder
        )
        self._web: ConnectionServer | None = None
        self._sockets: list[socket.socket] = []
        self._tls: ssl.SSLContext | None = None
        self._listener: Listener | None = None

    def bind(self) -> None:
        """Bind the port and load the certificate without serving yet. Raises `StartError`."""
        self._tls = self._make_tls()
        self._sockets = bind(self._section, self._listen.hosts, self._listen.port)

    def _make_tls(self) -> ssl.SSLContext | None:
        tls = self._listen.tls
        try:
            return ServerTls(tls).context if tls.cert_file else None
        except (OSError, ValueError) as error:
            files = f"listen.tls.cert_file {tls.cert_file} and listen.tls.key_file {tls.key_file}"
            raise StartError(f"{files} cannot be used: {reason(error)}") from None

    async def start(self) -> tuple[str, int]:
        """Listen and return the host and port in use. Raises `StartError`, `OSError`.

        Calls `bind` if that has not been done.
        """
        if not self._sockets:
            self.bind()
        listen = self._listen
        self._web = ConnectionServer(
            self._serve,
            self._server_context,
            self._sync_handler.answer,
            self._make_connection,
            keepalive_timeout=listen.keepalive_s,
            tcp_keepalive=True,
            access_log=None,  # an access log shows request targets, which may contain tokens
            logger=logger,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            lingering_time=LINGER_S,
            read_bufsize=READ_BYTES,
            auto_decompress=False,  # `content_coding` decodes the bodies that the shim itself reads
        )
        for bound in self._sockets:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        host, port = self._sockets[0].getsockname()[:2]
        self._listener = Listener(self._web, self._tls, listen.header_timeout_s)
        self._listener.start(self._sockets)
        return host, port

    def _make_guard(self, token: Callable[[], str] | None) -> Guard:
        return Guard(self._listen, token)

    def _make_connection_count(self) -> ConnectionCount:
        return ConnectionCount(self._metrics.connections)

    def _make_connection(self, *args: Any) -> AgentConnection:
        return AgentConnection(*args)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Stop accepting, wait at most `grace_s` for requests in progress, and close all connections. Idempotent."""
        if self._listener is not None:
            self._listener.stop()
        for bound in self._sockets:
            bound.close()
        if self._websockets is not None:
            await self._websockets.close()
        if self._web is not None:
            self._web.pre_shutdown()
            # aiohttp waits twice for so long: for handlers to finish, and then for the cancelled ones.
            await self._web.shutdown(grace_s / 2)

    # --- one request ---

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        visit = RequestContext(request)
        try:
            try:
                reply = await self._answer(visit)
                body = encode_body(reply.body) if isinstance(reply, Reply) and reply.body is not None else None
            except AgentError as error:
                reply = self._refuse(visit, error)
                body = encode_body(reply.body)
            except Exception:
                logger.exception("a defect while serving %s", visit.place)
                reply = self._fail(visit)
                body = encode_body(reply.body)
            if isinstance(reply, AgentWebSocket):
                return reply
            if isinstance(reply, ProxyResponse):
                return await self._writer.write_proxied(visit, reply)
            return await self._writer.reply(visit, reply, body)
        finally:
            if visit.session is not None:
                self._in_flight.leave(visit.session)

    def _fail(self, visit: RequestContext) -> Reply:
        """Return the reply to a request during which an unexpected exception was raised.

        Commands that it was about to offer are queued again.
        """
        self._metrics.internal_errors.labels("frontend").inc()
        if visit.receipt is not None:
            self._agent_service.unwritten(visit.receipt)
            visit.receipt = None
        return error_reply(Failed(500, "internal error"))

    async def _answer(self, visit: RequestContext) -> Reply | ProxyResponse | AgentWebSocket:
        """Return the reply to a request: check, route, read, parse and carry it out. Raises `AgentError`."""
        request, listen = visit.request, self._listen
        headers = request.headers
        _enforce(self._guard.check(headers))
        if self._websockets is not None and is_handshake(request):
            target = target_of(request.raw_path, listen.base_path)
            if self._websockets.serves(target):
                return await self._carry(visit, self._websockets, target)
        if self._fallback is not None and self._fallback.handles_all():
            return await self._proxy(visit, self._fallback)
        visit.step = "route"
        match = visit.match = self._routes.match(request)
        route = match.route
        visit.step = "auth"
        client = _identify(visit.connection, headers.get(hdrs.AUTHORIZATION))
        if not route.open:
            _enforce(self._guard.authorize(client.token))
            elsewhere = await self._elsewhere(visit, client)
            if elsewhere is not None:
                return elsewhere
        data, call, agent_call = await self._read(visit, client, match)
        visit.step = "answer"
        answer: CallResult | None = None
        if self._fallback is not None and self._fallback.handles_some() and self._fallback.handles(client, agent_call):
            served = await self._fallback.serve(forwarded(visit, listen.base_path, client, data, agent_call))
            if isinstance(served, ProxyResponse):
                visit.receipt = served.receipt
                return served
            answer = served
        if answer is None:
            answer = await self._agent_service.call(client, agent_call, visit.moment(agent_call))
        visit.receipt = answer.receipt
        return match.dialect.render(route.operation, answer.outcome, call)

    async def _elsewhere(self, visit: RequestContext, client: Caller) -> ProxyResponse | None:
        """Return the reply of the replica that owns the agent's shard, or None if this replica serves the call.

        Raises `AgentError`.
        """
        forwarder, request, match = self._forwarder, visit.request, visit.match
        if forwarder is None or not forwarder.elsewhere(client.token):
            return None
        if match is not None:
            visit.step = "in_flight"
            self._count_in(visit, client, session_in(match))
        limit_bytes = self._listen.max_body_bytes
        if not is_large(request, limit_bytes):
            visit.step = "body"
            visit.body = await read_body(request, limit_bytes, self._listen.body_timeout_s, self._budget)
        passed = forwarded(visit, "", client, visit.body, None)
        if visit.body is None:
            takes_all = self._fallback is not None and self._fallback.handles_all()
            limit = math.inf if takes_all else self._listen.max_status_body_bytes
            passed = replace(passed, body=stream_body(request, limit, self._listen.body_timeout_s))
        visit.step = "answer"
        reply = await forwarder.forward(passed, "" if match is None else match.route.operation)
        if reply is not None:
            visit.receipt = reply.receipt
        return reply

    async def _carry(self, visit: RequestContext, websockets: AgentWebSockets, target: str) -> AgentWebSocket:
        """Proxy an agent's own WebSocket to the controller until it ends.

        Raises `AgentError` if the controller's side cannot be opened.
        """
        request = visit.request
        visit.step = "auth"
        token = token_of(request)
        _enforce(self._guard.authorize(token))
        visit.step = "call"
        if not AgentWebSocket(self._max_message_bytes, "").can_prepare(request):
            raise AgentError(400, "malformed WebSocket handshake")
        visit.step = "answer"
        pairs = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.raw_headers)
        carried = await websockets.open(Handshake(target, pairs, token))
        agent = AgentWebSocket(self._max_message_bytes, carried.subprotocol)
        try:
            await agent.prepare(request)
        except BaseException:
            carried.abort()
            raise
        await carried.run(agent)
        return agent

    async def _read(self, visit: RequestContext, client: Caller, match: Match) -> tuple[bytes, Call, AgentCall]:
        """Read and parse the body of a call; return its bytes and the parsed call. Raises `AgentError`."""
        request, listen, route = visit.request, self._listen, match.route
        visit.step = "in_flight"
        self._count_in(visit, client, session_in(match))
        visit.step = "body"
        limit_bytes = listen.max_status_body_bytes if route.large else listen.max_body_bytes
        data = visit.body
        if data is None:
            data = await read_body(request, limit_bytes, listen.body_timeout_s, self._budget)
        plain = await plain_body(request, data, limit_bytes, self._budget)
        body = decode_body(plain, self._replaced) if route.method == hdrs.METH_POST else None
        visit.step = "call"
        call = Call(match.params, body, request.headers.get(hdrs.USER_AGENT, ""), is_shallow(plain), len(plain))
        agent_call = match.dialect.parse(route.operation, call)
        if isinstance(agent_call, RegisterCall):
            visit.step = "in_flight"
            self._count_in(visit, client, agent_call.agent_id or agent_call.name)
        return data, call, agent_call

    async def _proxy(self, visit: RequestContext, fallback: Fallback) -> Reply | ProxyResponse:
        """Send any request to the vendor's HTTP API, even one that has no route here or cannot be parsed."""
        request, listen = visit.request, self._listen
        with contextlib.suppress(AgentError):
            visit.match = self._routes.match(request)
        match = visit.match
        client = _identify(visit.connection, request.headers.get(hdrs.AUTHORIZATION))
        if match is None or not match.route.open:
            _enforce(self._guard.authorize(client.token))
            elsewhere = await self._elsewhere(visit, client)
            if elsewhere is not None:
                return elsewhere
        if match is not None:
            visit.step = "in_flight"
            self._count_in(visit, client, session_in(match))
        data = visit.body
        if data is None and not is_large(request, listen.max_body_bytes):
            visit.step = "body"
            data = await read_body(request, listen.max_body_bytes, listen.body_timeout_s, self._budget)
        elif data is None:
            meet_expectation(request)
        call, agent_call = Call({}), None
        if match is not None and data is not None:
            with contextlib.suppress(AgentError):
                plain = await plain_body(request, data, listen.max_body_bytes, self._budget)
                body = decode_body(plain, self._replaced) if match.route.method == hdrs.METH_POST else None
                call = Call(match.params, body, request.headers.get(hdrs.USER_AGENT, ""), is_shallow(plain), len(plain))
                agent_call = match.dialect.parse(match.route.operation, call)
        answer = await fallback.serve(forwarded(visit, listen.base_path, client, data, agent_call))
        if isinstance(answer, ProxyResponse):
            visit.receipt = answer.receipt
            return answer
        if match is None or agent_call is None:
            raise AgentError(502, "the vendor's HTTP API cannot be reached")
        if answer is None:
            answer = await self._agent_service.call(client, agent_call, visit.moment(agent_call))
        visit.receipt = answer.receipt
        return match.dialect.render(match.route.operation, answer.outcome, call)

    def _count_in(self, visit: RequestContext, client: Caller, ident: str) -> None:
        """Count a request of an agent, once per request. Raises `AgentError` 429."""
        if ident and visit.session is None:
            key = self._in_flight.key(client.token, ident)
            self._in_flight.enter(key)
            visit.session = key

    def _refuse(self, visit: RequestContext, error: AgentError) -> Reply:
        """Return the reply to a request that was rejected before it became a call."""
        self._metrics.bad_requests.labels(visit.step).inc()
        if isinstance(error, BodyRejected):
            visit.must_close = True
        if error.status == 401:
            visit.more = "WWW-Authenticate: Bearer\r\n"
        elif error.status == 405:
            visit.more = f"Allow: {', '.join(self._routes.allowed(visit.request))}\r\n"
        failed = Failed(error.status, str(error), error.retry_after_s)
        match = visit.match
        if match is None:
            return error_reply(failed)
        return match.dialect.render(match.route.operation, failed, Call(match.params))


def _enforce(failed: Failed | None) -> None:
    if failed is not None:
        raise AgentError(failed.status, failed.error, retry_after_s=failed.retry_after_s)


def _identify(connection: AgentConnection, authorization: str | None) -> Caller:
    """Return the caller, reused from the connection's previous request if the header is the same."""
    client = connection.client
    if client is None or authorization != connection.authorization:
        token = bearer(authorization)
        if token is None:
            raise AgentError(401, "the Authorization header is malformed")
        client = connection.client = Caller(token, connection.number)
        connection.authorization = authorization
    return client
