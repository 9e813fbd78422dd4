"""One agent's HTTP connection: aiohttp's protocol with bounds, evidence of delivery and explicit closing."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine
from typing import Any, Protocol, cast

import msgspec
from aiohttp.http import HttpVersion11
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from aiohttp.web_server import Server

from shim.agent_api import tcp_state
from shim.agent_api.responses import NO_ROUTE, SENT_CLOSE
from shim.agent_api.server_context import ServerContext
from shim.agent_api.tcp_state import PeerWatch
from shim.core.agent_calls import AgentCall, Commands
from shim.errors import AgentError
from shim.http_connection import HttpConnection
from shim.http_heads import KnownHead
from shim.ports import Caller, DeliveryReceipt, FallbackScope
from shim.protocol.dialects import Call, Match, Reply
from shim.protocol.http import bearer

FAREWELL_S = 2.0

logger = logging.getLogger(__name__)


class Handler(Protocol):
    """The handler of a connection's requests. `RequestHandler` cannot be named here, because it imports this module."""

    def begin(self, request: RequestContext, /) -> Reply | Coroutine[Any, Any, Any] | None:
        """Carry a request as far as that is possible without waiting."""

    def forward_or_serve(self, request: RequestContext, /) -> Coroutine[Any, Any, Any]:
        """Forward a request to the replica that owns the agent's shard, or serve it here if there is none."""

    def response(self, request: RequestContext, reply: Reply, /) -> bytes:
        """Return the whole response to a request that was answered without waiting."""

    def abandon(self, request: RequestContext, /) -> None:
        """Drop a request that has begun and is not finished."""


class AgentConnection(HttpConnection):
    """One agent's connection.

    `number` is unique in the process. The connection infers evidence of delivery for the commands in its replies: the
    agent's next request, or how the connection ends.
    """

    remembers_heads = True

    __slots__ = (
        "_aborted",
        "_acknowledged",
        "_authorization",
        "_caller",
        "_context",
        "_entered",
        "_evidence_awaited",
        "_had_commands",
        "_handler",
        "_own_socket",
        "_peer_watch",
        "_refused",
        "_server_context",
        "_socket",
        "lost",
        "number",
    )

    def __init__(
        self,
        server: Server,
        server_context: ServerContext,
        handler: Handler,
        number: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__(server, server_context.budget, server_context.listen.header_timeout_s, options)
        self.number = number
        self._caller: Caller | None = None
        self._authorization: str | None = None
        self._context: RequestContext | None = None  # a request that has begun and waits for its handler task
        self._handler = handler
        self._server_context = server_context
        self._socket: socket.socket | None = None  # or asyncio's `TransportSocket`, which has the methods used here
        self._own_socket: socket.socket | None = None
        self._entered = self._refused = False
        self.lost = False
        self._evidence_awaited = False
        self._peer_watch: PeerWatch | None = None
        self._had_commands = self._acknowledged = False
        self._aborted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse the connection if there are too many, else prepare it for evidence of delivery."""
        self._wire = wire = cast("asyncio.Transport", transport)
        tls = wire.get_extra_info("sslcontext") is not None
        self._socket = wire.get_extra_info("socket")
        if tls:
            # A TLS transport closes its socket before it calls `connection_lost`, which must still query the kernel.
            self._socket = self._own_socket = self._socket.dup()
        if not self._entered and not self.enter():
            self._refused = True
            wire.write(self._refusal(503, "too many connections"))
            wire.close()
            return
        # With these limits, writing pauses unless the kernel accepts a reply completely. So once `write` returns, the
        # reply is with the kernel. asyncio's TLS transport compares with >=: a limit of 0 would pause it for ever.
        wire.set_write_buffer_limits(high=1 if tls else 0, low=0)
        super().connection_made(transport)
        # A client may connect in advance, but one that never sends a request must not occupy a connection for ever.
        self._watch_for_first_request(self._server_context.listen.keepalive_s)
        self._read_on()  # a TLS client may send its request with the end of its handshake

    def enter(self) -> bool:
        """Count the connection when it is accepted; return False if there are too many."""
        self._entered = True
        self._server_context.connections.entered()
        if self._server_context.connections.open <= self._server_context.listen.max_connections:
            return True
        self._server_context.metrics.bad_requests.labels("connections").inc()
        return False

    def leave(self) -> None:
        """End the count of the connection, also after a failed TLS handshake. Idempotent."""
        if self._entered:
            self._entered = False
            self._server_context.connections.left()

    def eof_received(self) -> None:
        """Note if the peer's kernel has acknowledged everything so far."""
        # asyncio's TLS now sends a close alert, which the peer will not acknowledge: query the kernel before that.
        self._note_acknowledgement(closed_by_peer=True)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release everything that the connection holds, and report its end as evidence of delivery."""
        self.lost = True
        self.leave()
        self._drop_what_is_held()
        self._note_acknowledgement()
        if self._peer_watch is not None:
            self._peer_watch.end()
        if self._own_socket is not None:
            self._own_socket.close()
        self._wire = self._socket = None  # the kernel may soon reuse the file descriptor for another connection
        if self._refused:
            return
        super().connection_lost(exc)
        self._pending = None
        if self._context is not None:
            self._handler.abandon(self._context)
            self._context = None
        if self._had_commands:
            self._server_context.backends.evidence.connection_closed(self.number, exc is None and self._acknowledged)

    def force_close(self) -> None:
        """Close at once, after noting if everything was acknowledged."""
        self._note_acknowledgement()
        super().force_close()

    def abort(self) -> None:
        """Drop the connection with all unsent bytes."""
        self._aborted = True
        super().abort()

    def _note_acknowledgement(self, *, closed_by_peer: bool = False) -> None:
        wire, sock = self._wire, self._socket
        if wire is None or sock is None or not self._had_commands or self._acknowledged or self._aborted:
            return
        is_there = closed_by_peer or tcp_state.closed_or_present(sock, self._loop.time())
        self._acknowledged = is_there and not wire.get_write_buffer_size() and tcp_state.acknowledged(sock)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _begin_request(
        self, message: RawRequestMessage, body: StreamReader, arrived_s: float, earliest_s: float | None = None
    ) -> bool:
        """Pass a request to the handler; return True if it is answered, or will be by another replica.

        `earliest_s` is the time before which the request certainly did not arrive, if that is not `arrived_s`.
        Otherwise a handler task finishes it (`take_request`). `_waiter`, `_messages` and `_next_keepalive_close_time`
        are private to aiohttp's `RequestHandler`.
        """
        if self._evidence_awaited:
            self._note_next_request()
        context = RequestContext(self, message, body, arrived_s, self._received_s)
        if earliest_s is not None:
            context.arrived_s = earliest_s
        context.immediate = (
            self._may_answer_at_once()
            and not (message.should_close or message.upgrade)
            and context.complete
            and message.version == HttpVersion11
        )
        answered = self._serve(context)
        if answered and self._pending is None:
            self._http.message_consumed()
        return answered

    def _begin_known_request(self, known: KnownHead, body: bytes) -> bool:
        if not self._may_answer_at_once():
            return False
        if self._evidence_awaited:
            self._note_next_request()
        self._open = True
        context = RequestContext(self, known.message, body, self._received_s, self._received_s)
        context.immediate = True
        context.admitted = known.admitted
        answered = self._serve(context)
        known.admitted = context.admitted
        if answered:
            self._open = self._pending is not None
        else:
            self._body = context.payload
            self._pass_to_task(known.message, context.payload)
        return True

    def _may_answer_at_once(self) -> bool:
        """Return True if a reply that is written now overtakes no other and reaches the kernel at once.

        A pending waiter shows that no handler task is running.
        """
        waiter, wire = self._waiter, self._wire
        return (
            waiter is not None
            and not waiter.done()
            and not (self._messages or self._pipelined or self.writing_paused)
            and wire is not None
            and not wire.is_closing()
        )

    def _serve(self, context: RequestContext) -> bool:
        """Pass a request to the handler; return True if it is answered, or will be by another replica."""
        answer = self._handler.begin(context)
        wire = self._wire
        if isinstance(answer, Reply) and context.immediate and context.receipt is None and wire is not None:
            response = self._handler.response(context, answer)
            self._next_keepalive_close_time = self._received_s + self._keepalive_timeout
            wire.write(response)
            return True
        if answer is None:
            self._pending = context
            return True
        context.answer = answer
        self._context = context
        return False

    def take_request(self, request: BaseRequest) -> RequestContext:
        """Return the request that its handler task finishes. The task calls this once."""
        context, self._context = self._context, None
        if context is None:
            raise RuntimeError("a request that was not begun")
        context.request = request
        self._unread_bytes = 0
        self._charge()
        return context

    def identify(self, authorization: str | None) -> Caller:
        """Return the caller of a request, the same object for the same header.

        Raises `AgentError` 401 if the header is malformed.
        """
        caller = self._caller
        if caller is None or authorization != self._authorization:
            token = bearer(authorization)
            if token is None:
                raise AgentError(401, "the Authorization header is malformed")
            caller = self._caller = Caller(token, self.number)
            self._authorization = authorization
        return caller

    @property
    def raw_request(self) -> bytes:
        """The bytes of the request that has just begun, empty if they arrived in pieces."""
        return self._raw

    def answer_late(self, response: bytes | None) -> None:
        """Write the response of another replica to a request that `_begin_request` has left pending.

        Without a response, a handler task finishes the request. After the loss of the connection, nothing happens.
        """
        context, self._pending = self._pending, None
        wire = self._wire
        if context is None or wire is None or wire.is_closing():
            return
        if response is None:
            context.answer = self._handler.forward_or_serve(context)
            self._context = context
            self._pass_to_task(context.message, context.payload)
        else:
            self._http.message_consumed()
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            wire.write(response)
            self._request_over()

    def _refusal(self, status: int, error: str, more: str = "") -> bytes:
        """Return and record the response to a request that is rejected before its route is known."""
        self._server_context.refused.note(self._loop.time(), status, NO_ROUTE, error)
        return self._server_context.responses.error(status, error, more=more)

    def _count_refused(self, reason: str) -> None:
        self._server_context.metrics.bad_requests.labels(reason).inc()

    def _note_next_request(self) -> None:
        """Report the next request, which is evidence that the agent has read the previous reply.

        A pipelined request was sent before the agent could read that reply, so it is no evidence.
        """
        if self._evidence_awaited and not self._pipelined:
            self._evidence_awaited = False
            self._server_context.backends.evidence.next_request(self.number)

    def peer_can_receive(self, *, for_commands: bool) -> bool:
        """Return False if the agent is known to have disconnected.

        For a reply with commands the kernel is queried as well: the event loop may not have seen the FIN yet.
        """
        wire, sock = self._wire, self._socket
        if wire is None or sock is None or wire.is_closing() or self.transport is None:
            return False
        if for_commands and tcp_state.unread(sock):
            # A request that the agent has sent before this reply is written is no evidence that it has read the reply.
            self._pipelined = True
            self._unread_since_s = self._loop.time()
        return not (for_commands and tcp_state.hung_up(sock))

    async def write(self, response: bytes, timeout_s: float) -> bool:
        """Pass a response, or a piece of one, to the kernel; return False if the connection is lost.

        A peer that does not read for `timeout_s` is disconnected.
        """
        wire = self._wire
        if wire is None:
            return False
        wire.write(response)
        if self.writing_paused:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._drain_helper()
            except TimeoutError:
                self.abort()
            except ConnectionError:
                return False
        return not wire.is_closing()

    def offer(self, receipt: DeliveryReceipt) -> None:
        """Prepare for a response that offers commands; only connections of replicas need that."""

    def settle(self, receipt: DeliveryReceipt, *, written: bool) -> None:
        """Report if the response with these commands was written; if so, watch the connection for evidence."""
        if written:
            self._evidence_awaited = self._had_commands = True
            evidence = self._server_context.backends.evidence
            watch = self._peer_watch = self._peer_watch or PeerWatch(evidence, self.number)
            evidence.written(receipt, watch.open_until)
            watch.begin(self._socket)
        else:
            self._server_context.backends.evidence.unwritten(receipt)

    def more_headers(self, receipt: DeliveryReceipt | None) -> dict[str, str]:
        """Return further headers for a reply; only connections of replicas have any."""
        return {}

    async def await_peer_close(self) -> None:
        """Wait briefly for the agent to close the connection after a last reply with commands.

        A clean close by the agent is evidence that it has read the reply.
        """
        wire = self._wire
        if wire is None or wire.is_closing():
            return
        if wire.can_write_eof():
            wire.write_eof()
        await asyncio.sleep(FAREWELL_S)  # ends early: aiohttp cancels the handler when the agent closes

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """Close a connection whose handler failed; aiohttp's default would write a second response, in plain text."""
        self._server_context.metrics.internal_errors.labels("frontend").inc()
        logger.error("a handler failed after its reply", exc_info=exc)
        return SENT_CLOSE


class Admitted(msgspec.Struct):
    """The route, the caller and the headers of an accepted request, the same for all requests with the same head.

    `request_id` is None unless it is well-formed. `plain` is True if the body has no content coding and the agent waits
    for no interim response. `call` and `agent_call` are those of a request without a body. `no_commands` is the outcome
    of a poll without commands, with its reply and encoded body.
    """

    match: Match
    caller: Caller
    user_agent: str
    request_id: str | None
    plain: bool
    call: Call | None = None
    agent_call: AgentCall | None = None
    no_commands: tuple[Commands, Reply, bytes | None] | None = None


class RequestContext:
    """The state of one request while it is served.

    The request did not arrive before `arrived_s`; `started_s` is the best estimate of its arrival, and `now_s` the time
    at which it was complete (loop time). `complete` is True if its whole body has arrived, `immediate` if its reply may
    be written without a handler task. `step` names the current step for the metric `bad_requests`. `answer` is the
    reply, or the coroutine that makes it. `request` is aiohttp's object, which exists in the handler task only.
    `request_id` is the client's, None unless it is well-formed. `data` are the bytes of the body once they are read,
    and `encoded` those of the reply's body. `scope` is the share of calls that may go by the vendor's HTTP API.
    """

    __slots__ = (
        "admitted",
        "answer",
        "arrived_s",
        "body",
        "call",
        "caller",
        "complete",
        "connection",
        "data",
        "encoded",
        "headers",
        "immediate",
        "in_flight",
        "match",
        "message",
        "more",
        "must_close",
        "now_s",
        "receipt",
        "request",
        "request_id",
        "scope",
        "started_s",
        "step",
    )

    def __init__(
        self,
        connection: AgentConnection,
        message: RawRequestMessage,
        body: StreamReader | bytes,
        arrived_s: float,
        now_s: float,
    ) -> None:
        self.connection = connection
        self.message = message
        self.headers = message.headers
        self.body = body
        self.started_s = self.arrived_s = arrived_s
        self.now_s = now_s
        self.complete = isinstance(body, bytes) or (body.is_eof() and body.exception() is None)
        self.immediate = False
        self.admitted: Admitted | None = None
        self.answer: Reply | Coroutine[Any, Any, Any] | None = None
        self.request: BaseRequest | None = None
        self.request_id: str | None = None
        self.match: Match | None = None
        self.caller: Caller | None = None
        self.call: Call | None = None
        self.data: bytes | None = None
        self.encoded: bytes | None = None
        self.receipt: DeliveryReceipt | None = None
        self.in_flight: tuple[str, str] | None = None  # the key in `InFlight`, once the request is counted there
        self.scope = FallbackScope.NONE
        self.step = "guard"
        self.more = ""
        self.must_close = False

    @property
    def payload(self) -> StreamReader:
        """The reader of the body."""
        body = self.body
        if isinstance(body, bytes):
            data, body = body, EMPTY_PAYLOAD
            if data:
                body = StreamReader(self.connection, len(data), loop=asyncio.get_running_loop())
                body.feed_data(data)
                body.feed_eof()
            self.body = body
        return body
