"""The way of a request through the agents' server: check, route, read, parse, carry out, reply.

`RequestHandler.begin` carries every request as far as that is possible without waiting, inside `data_received`. Most
requests are heartbeats and end there. For all others `begin` returns a coroutine, which a handler task finishes.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from aiohttp import hdrs
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from msgspec.structs import replace

from shim.agent_api.admission import Guard, RouteCache, Router, is_handshake, token_of
from shim.agent_api.connection import Admitted, RequestContext
from shim.agent_api.forwarding import forward_at_once, forwarded, is_large, target_of
from shim.agent_api.request_body import (
    RETRY_AFTER_S,
    BodyRejected,
    LongWork,
    check_announcement,
    plain_body,
    read_body,
    stream_body,
    whole_body,
)
from shim.agent_api.response_writer import REQUEST_ID, ResponseWriter
from shim.agent_api.responses import encode_body, well_formed_id
from shim.agent_api.server_context import ServerContext
from shim.core.agent_calls import AgentCall, Commands, Failed, PollCall, RegisterCall
from shim.core.bounds import LONG_TEXT_BYTES, MAX_DEPTH
from shim.errors import AgentError, ConfigError
from shim.fallback.websocket_proxy import WebSocketProxy
from shim.ports import (
    Caller,
    CallResult,
    Fallback,
    FallbackScope,
    ProxyResponse,
)
from shim.protocol.dialects import Call, Dialect, Match, Reply, error_reply
from shim.protocol.lenient_json import decode_body, decode_valid

TOKEN_RETRY_AFTER_S = 5  # a changed token file is noticed within this time
logger = logging.getLogger(__name__)
Answer = Reply | ProxyResponse | StreamResponse
Served = Answer | CallResult
"""The end of a request. A `CallResult` must still be rendered as a reply."""
Waiting = Coroutine[Any, Any, Served]
"""The rest of a request that has to wait, as a coroutine that has not started."""


class InFlight:
    """Number of requests in progress per agent.

    An agent is identified by the id in its calls, and by its token if agents bring tokens of their own.
    """

    def __init__(self, limit: int, *, own_tokens: bool) -> None:
        self._limit = limit
        self._own_tokens = own_tokens
        self._counts: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """Return the number of agents with requests in progress."""
        return len(self._counts)

    def enter(self, token: str, ident: str) -> tuple[str, str]:
        """Count a request of the agent with this token and id; return the key for `leave`.

        Raises `AgentError` 429 beyond the limit.
        """
        key = (token if self._own_tokens else "", ident)
        count = self._counts.get(key, 0)
        if count >= self._limit:
            raise AgentError(429, "too many requests of this agent at a time", retry_after_s=RETRY_AFTER_S)
        self._counts[key] = count + 1
        return key

    def leave(self, key: tuple[str, str]) -> None:
        """End the count of a request."""
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]


class RequestHandler:
    """Handler of all requests of one server.

    `token()` returns the upstream token; `token` is None if agents bring tokens of their own.
    """

    def __init__(
        self,
        server_context: ServerContext,
        guard: Guard,
        dialects: Iterable[Dialect],
        token: Callable[[], str] | None,
    ) -> None:
        listen = server_context.listen
        backends = server_context.backends
        self._listen = listen
        self._agent_service = backends.agent_service
        self._evidence = backends.evidence
        self._fallback = backends.fallback
        self._forwarder = backends.forwarder
        self._is_elsewhere = None if backends.forwarder is None else backends.forwarder.elsewhere
        self._websockets = backends.websockets
        self._max_message_bytes = backends.max_message_bytes
        self._metrics = server_context.metrics
        self._budget = server_context.budget
        self._guard = guard
        self._routes = RouteCache(Router(dialects, listen.base_path))
        self._in_flight = InFlight(listen.max_in_flight_per_session, own_tokens=token is None)
        self._token = token
        needed = listen.auth == "required" or (listen.auth == "auto" and not listen.on_loopback)
        self._token_needed = token is None or needed
        self._long_work = LongWork()
        self._responses = server_context.responses
        self._writer = ResponseWriter(server_context)
        self._replaced = server_context.metrics.invalid_characters.labels("agent").inc

    # --- the way of every request -------------------------------------------------------------------------------------

    def begin(self, request: RequestContext) -> Reply | Waiting | None:
        """Carry a request as far as that is possible without waiting. Never raises.

        Returns the reply, or the rest as a coroutine. None means that another replica answers, which calls
        `AgentConnection.answer_late`. The caller finishes the request by exactly one of `response`, `finish` and
        `abandon`, unless it got None.
        """
        try:
            admitted = request.admitted
            if admitted is None:
                headers = request.headers
                request.request_id = well_formed_id(headers.get(REQUEST_ID))
                self._guard.check(headers)
                if self._websockets is not None and hdrs.UPGRADE in headers and is_handshake(request.message):
                    target = target_of(request.message.path, self._listen.base_path)
                    if self._websockets.serves(target):
                        return self._carry(request, self._websockets, target)
            else:
                request.request_id = admitted.request_id
            if self._fallback is not None and self._fallback.in_use:
                request.scope = self._fallback.scope()
                if request.scope is FallbackScope.ALL:
                    return self._proxy(request, self._fallback)
            if admitted is None:
                admitted = self._admit(request)
            match = request.match = admitted.match
            caller = request.caller = admitted.caller
            request.step = "auth"
            if not match.route.open:
                if self._token_needed:
                    self._authorize(caller.token)
                request.step = "owner"
                if self._is_elsewhere is not None and self._is_elsewhere(caller.token):
                    limit_bytes = self._listen.max_body_bytes
                    at_once = forward_at_once(request, match, caller, self._forwarder, limit_bytes)
                    return None if at_once else self.forward_or_serve(request)
            return self._serve(request, admitted)
        except Exception as error:  # noqa: BLE001 - a defect is logged there
            return self._reply_to(request, error)

    def _admit(self, request: RequestContext) -> Admitted:
        """Return the route, the caller and the headers of a request.

        Raises `AgentError` if it has no route or a malformed token.
        """
        headers = request.headers
        request.step = "route"
        match = request.match = self._routes[request.message.method, request.message.path]
        request.step = "auth"
        caller = request.connection.identify(headers.get(hdrs.AUTHORIZATION))
        admitted = request.admitted = Admitted(
            match,
            caller,
            headers.get(hdrs.USER_AGENT, ""),
            request.request_id,
            hdrs.EXPECT not in headers and hdrs.CONTENT_ENCODING not in headers,
        )
        return admitted

    def _authorize(self, token: str) -> None:
        """Raise `AgentError` 401 for a Bearer token that is not accepted; a missing token is an empty string.

        Raises `AgentError` 503 while the file with the expected token cannot be read.
        """
        if self._token is None:
            if not token:
                raise AgentError(401, "a token is required")
        elif self._token_needed:
            try:
                expected = self._token()
            except ConfigError:  # the log says why, for the link cannot be dialled either
                raise AgentError(503, "the shim cannot read its own token", retry_after_s=TOKEN_RETRY_AFTER_S) from None
            # While the upstream token is not available yet it is empty, and must not equal the empty token of a call.
            if not expected or not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), expected.encode()):
                raise AgentError(401, "the token is not accepted")

    def _serve(self, request: RequestContext, admitted: Admitted) -> Reply | Waiting:
        """Serve a request at this replica. Raises `AgentError`."""
        match, caller = admitted.match, admitted.caller
        if request.in_flight is None and match.ident:
            request.step = "in_flight"
            request.in_flight = self._in_flight.enter(caller.token, match.ident)
        request.step = "body"
        listen = self._listen
        limit_bytes = listen.max_status_body_bytes if match.route.large else listen.max_body_bytes
        if not (request.complete and admitted.plain):
            check_announcement(request, limit_bytes)
            return self._read_and_serve(request, caller, match, limit_bytes)
        data = request.body
        if not isinstance(data, bytes) or len(data) > limit_bytes:
            data = whole_body(data, limit_bytes)
        request.data = data
        if len(data) > LONG_TEXT_BYTES:
            return self._read_and_serve(request, caller, match, limit_bytes)
        return self._call(request, caller, self._parse(request, match, data))

    async def _read_and_serve(self, request: RequestContext, caller: Caller, match: Match, limit_bytes: int) -> Served:
        if request.data is None:
            request.data = await read_body(request, limit_bytes, self._listen.body_timeout_s, self._budget)
        plain = await plain_body(request, request.data, limit_bytes, self._budget)
        async with self._long_work.turn(len(plain)):
            request.now_s = request.connection.now_s()
            answer = self._call(request, caller, self._parse(request, match, plain))
        return answer if isinstance(answer, Reply) else await answer

    def _parse(self, request: RequestContext, match: Match, data: bytes) -> AgentCall:
        """Return the call in a decoded body. Raises `AgentError`."""
        admitted, route = request.admitted, match.route
        if not data and admitted is not None and admitted.agent_call is not None:
            request.call = admitted.call
            return admitted.agent_call
        body = None
        if data and route.method == hdrs.METH_POST:
            try:
                body = decode_valid(data) if len(data) <= LONG_TEXT_BYTES else decode_body(data, self._replaced)
            except (ValueError, RecursionError):
                body = decode_body(data, self._replaced)
        request.step = "call"
        shallow = data.count(b"{") + data.count(b"[") <= MAX_DEPTH
        user_agent = request.headers.get(hdrs.USER_AGENT, "") if admitted is None else admitted.user_agent
        call = request.call = Call(match.params, body, user_agent, shallow, len(data))
        agent_call = match.dialect.parse(route.operation, call)
        if not data and admitted is not None:
            admitted.call, admitted.agent_call = call, agent_call
        return agent_call

    def _call(self, request: RequestContext, caller: Caller, call: AgentCall) -> Reply | Waiting:
        """Carry out a call by the bridge, or by the vendor's HTTP API if the mode demands that. Raises `AgentError`."""
        if isinstance(call, RegisterCall):
            request.step = "in_flight"
            self._count_in(request, caller, call.agent_id or call.name)
        request.step = "answer"
        fallback = self._fallback
        if fallback is not None and request.scope is FallbackScope.SOME and fallback.handles(caller, call):
            return self._by_fallback(request, fallback, caller, call)
        # A poll that may have been sent before a reply does not show that the reply was read: the earlier bound counts.
        arrived_s = request.arrived_s if isinstance(call, PollCall) else request.started_s
        result = self._agent_service.call(caller, call, arrived_s, request.now_s)
        return self._render(request, result) if isinstance(result, CallResult) else result

    def _render(self, request: RequestContext, result: CallResult) -> Reply:
        request.receipt = result.receipt
        match, call, outcome = request.match, request.call, result.outcome
        if match is None or call is None:
            raise ValueError("a result without a call")
        admitted = request.admitted
        known = None if admitted is None else admitted.no_commands
        if known is not None and known[0] is outcome:
            _, reply, request.encoded = known
            return reply
        reply = match.dialect.render(match.route.operation, outcome, call)
        request.encoded = None if reply.body is None else encode_body(reply.body)
        if admitted is not None and admitted.call is call and isinstance(outcome, Commands) and not outcome.commands:
            admitted.no_commands = outcome, reply, request.encoded
        return reply

    # --- the end of every request -------------------------------------------------------------------------------------

    def response(self, request: RequestContext, reply: Reply) -> bytes:
        """Return the whole response to a request that was answered without waiting, and count it.

        The connection stays open.
        """
        if request.in_flight is not None:
            self._in_flight.leave(request.in_flight)
        head_only = request.message.method == hdrs.METH_HEAD
        response = self._responses.response(
            reply, request.encoded, request.request_id, request.more, head_only=head_only
        )
        took_s = request.connection.now_s() - request.started_s
        self._metrics.requests.count(request.match, reply.status, took_s)
        if reply.status >= 400:
            self._writer.record_refusal(request, reply)
        return response

    async def finish(self, aiohttp_request: BaseRequest) -> StreamResponse:
        """Finish a request in its handler task, and write its reply."""
        request: RequestContext = aiohttp_request.protocol.take_request(aiohttp_request)  # type: ignore[attr-defined]
        try:
            try:
                begun = request.answer
                if begun is None:
                    raise ValueError("a request that was not begun")
                served = begun if isinstance(begun, Reply) else await begun
                answer = self._render(request, served) if isinstance(served, CallResult) else served
            except Exception as error:  # noqa: BLE001 - a defect is logged there
                answer = self._reply_to(request, error)
            if isinstance(answer, StreamResponse):
                return answer
            if isinstance(answer, ProxyResponse):
                return await self._writer.write_proxied(request, answer)
            return await self._writer.reply(request, answer)
        finally:
            self._release(request)

    def abandon(self, request: RequestContext) -> None:
        """Drop a request that has begun and is not finished, because its connection was lost."""
        if isinstance(request.answer, Coroutine):
            request.answer.close()
        self._release(request)

    def _release(self, request: RequestContext) -> None:
        if request.in_flight is not None:
            self._in_flight.leave(request.in_flight)
            request.in_flight = None

    def _count_in(self, request: RequestContext, caller: Caller, ident: str) -> None:
        """Count a request of an agent, once per request. Raises `AgentError` 429."""
        if ident and request.in_flight is None:
            request.in_flight = self._in_flight.enter(caller.token, ident)

    def _reply_to(self, request: RequestContext, error: Exception) -> Reply:
        """Return the reply to a request that was rejected before it became a call, or met a defect.

        Commands that it was about to offer are queued again.
        """
        if isinstance(error, AgentError):
            reply = self._refuse(request, error)
        else:
            match = request.match
            place = ("", "") if match is None else (match.dialect.NAME, match.route.operation)
            logger.error("a defect while serving %s", place, exc_info=error)
            self._metrics.internal_errors.labels("frontend").inc()
            reply = error_reply(Failed(500, "internal error"))
        if request.receipt is not None:
            self._evidence.unwritten(request.receipt)
            request.receipt = None
        request.encoded = encode_body(reply.body)
        return reply

    def _refuse(self, request: RequestContext, error: AgentError) -> Reply:
        self._metrics.bad_requests.labels(request.step).inc()
        if isinstance(error, BodyRejected):
            request.must_close = True
            request.immediate = False
        if error.status == 401:
            request.more = "WWW-Authenticate: Bearer\r\n"
        elif error.status == 405:
            request.more = f"Allow: {self._routes.allowed(error, request.message.path)}\r\n"
        failed = Failed(error.status, str(error), error.retry_after_s)
        match = request.match
        if match is None:
            return error_reply(failed)
        return match.dialect.render(match.route.operation, failed, request.call or Call(match.params))

    # --- other replicas -----------------------------------------------------------------------------------------------

    async def forward_or_serve(self, request: RequestContext) -> Served:
        """Return the reply of the replica that owns the agent's shard, or serve the call here if there is none."""
        reply = await self._forward(request)
        if reply is not None:
            return reply
        admitted = request.admitted
        if admitted is None:
            raise ValueError("a request without a caller")
        request.now_s = request.connection.now_s()
        if request.data is None:
            served = self._serve(request, admitted)
        else:  # the body was read to be forwarded
            served = self._read_and_serve(request, admitted.caller, admitted.match, self._listen.max_body_bytes)
        return served if isinstance(served, Reply) else await served

    async def _forward(self, request: RequestContext) -> ProxyResponse | None:
        """Return the reply of the replica that owns the agent's shard, or None if this replica serves the call.

        Raises `AgentError`.
        """
        forwarder, match, caller = self._forwarder, request.match, request.caller
        if forwarder is None or caller is None:
            return None
        if match is not None:
            request.step = "in_flight"
            self._count_in(request, caller, match.ident)
        limit_bytes = self._listen.max_body_bytes
        takes_all = self._fallback is not None and self._fallback.scope() is FallbackScope.ALL
        # Other calls are forwarded with their whole body: a slow one would use up the time of the owner's answer.
        may_stream = takes_all or match is None or match.route.large
        if not (may_stream and is_large(request, limit_bytes)):
            request.step = "body"
            check_announcement(request, limit_bytes)
            request.data = await read_body(request, limit_bytes, self._listen.body_timeout_s, self._budget)
        passed = forwarded(request, "", caller, None)
        if request.data is None:
            limit = math.inf if takes_all else self._listen.max_status_body_bytes
            passed = replace(passed, body=stream_body(request, limit, self._listen.body_timeout_s))
        request.step = "answer"
        reply = await forwarder.forward(passed, "" if match is None else match.route.operation)
        if reply is not None:
            request.receipt = reply.receipt
        return reply

    # --- the vendor's HTTP API ----------------------------------------------------------------------------------------

    async def _by_fallback(
        self, request: RequestContext, fallback: Fallback, caller: Caller, call: AgentCall
    ) -> Served:
        served = await fallback.serve(forwarded(request, self._listen.base_path, caller, call))
        if isinstance(served, ProxyResponse):
            request.receipt = served.receipt
            return served
        return await self._answer_here(request, caller, call) if served is None else served

    async def _answer_here(self, request: RequestContext, caller: Caller, call: AgentCall) -> Served:
        """Carry out a call that the HTTP API was not asked for after all."""
        request.now_s, request.scope = request.connection.now_s(), FallbackScope.NONE
        answer = self._call(request, caller, call)
        return answer if isinstance(answer, Reply) else await answer

    async def _proxy(self, request: RequestContext, fallback: Fallback) -> Served:
        """Send any request to the vendor's HTTP API, even one that has no route here or cannot be parsed."""
        listen = self._listen
        with contextlib.suppress(AgentError):
            request.match = self._routes[request.message.method, request.message.path]
        match = request.match
        caller = request.caller = request.connection.identify(request.headers.get(hdrs.AUTHORIZATION))
        if match is None or not match.route.open:
            self._authorize(caller.token)
            request.step = "owner"
            if self._is_elsewhere is not None and self._is_elsewhere(caller.token):
                elsewhere = await self._forward(request)
                if elsewhere is not None:
                    return elsewhere
        if match is not None:
            request.step = "in_flight"
            self._count_in(request, caller, match.ident)
        if request.data is None and not is_large(request, listen.max_body_bytes):
            request.step = "body"
            check_announcement(request, listen.max_body_bytes)
            request.data = await read_body(request, listen.max_body_bytes, listen.body_timeout_s, self._budget)
        agent_call = None
        if match is not None and request.data is not None:
            request.call = Call(match.params)
            with contextlib.suppress(AgentError):
                plain = await plain_body(request, request.data, listen.max_body_bytes, self._budget)
                agent_call = self._parse(request, match, plain)
        request.step = "answer"
        passed = forwarded(request, listen.base_path, caller, agent_call)
        if request.data is None:
            passed = replace(passed, body=stream_body(request, math.inf, listen.body_timeout_s))
        answer = await fallback.serve(passed)
        if isinstance(answer, ProxyResponse):
            request.receipt = answer.receipt
            return answer
        if match is None or agent_call is None:
            raise AgentError(502, "the vendor's HTTP API cannot be reached")
        return await self._answer_here(request, caller, agent_call) if answer is None else answer

    # --- agents with a WebSocket of their own -------------------------------------------------------------------------

    async def _carry(self, request: RequestContext, websockets: WebSocketProxy, target: str) -> StreamResponse:
        """Proxy an agent's own WebSocket to the controller until it ends.

        Raises `AgentError` if the controller's side cannot be opened.
        """
        from shim.agent_api.agent_websocket import carry  # noqa: PLC0415 - memory only where one migrated

        request.step = "auth"
        token = token_of(request.message)
        self._authorize(token)
        return await carry(request, websockets, target, token, self._max_message_bytes)
