"""The internal listener: requests that other replicas forward, and notes about the replies to them.

Notes are HTTP/1.1 requests that get no reply, on the connection that carried the reply. If the connection ends without
a note, the outcome is unknown.

A reply is written to the forwarding replica, whose kernel acknowledges it. That is no evidence that the agent received
it. So only the other replica's notes are evidence, and a reply without a note is uncertain when the connection ends.
Notes are handled where requests are parsed, because aiohttp cancels a handler when its connection ends.
"""

from __future__ import annotations

import hmac
import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from typing import Any, cast

from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from shim.agent_api.admission import Guard
from shim.agent_api.connection import AgentConnection, RequestContext
from shim.agent_api.request_body import read_body
from shim.agent_api.request_handler import Answer, RequestHandler, Waiting
from shim.agent_api.response_writer import MISDIRECTED
from shim.agent_api.server import MAX_HEADERS, AgentServer
from shim.agent_api.server_context import ConnectionCount
from shim.core.bounds import MAX_HEAD_BYTES, MAX_LINE_BYTES
from shim.core.command_queue import unknown_open
from shim.errors import AgentError
from shim.metrics import Metrics
from shim.ports import Caller, DeliveryReceipt, ProxyResponse
from shim.protocol.dialects import Reply
from shim.protocol.http import bearer

METHOD = "NOTIFY"
OPERATOR = "operator"
HEARTBEATS = "heartbeats"

ARRIVAL_HEADER = "X-Shim-Arrival"  # of a forwarded request: its age, and an owner's time before which it did not arrive
RECEIPT_HEADER = "X-Shim-Receipt"  # of a reply that offers commands
CLOCK_HEADER = "X-Shim-Clock"  # of a reply: the owner's monotonic clock
OWN_HEADERS = frozenset(map(str.lower, (ARRIVAL_HEADER, RECEIPT_HEADER, CLOCK_HEADER)))
"""Headers that no agent's request and no reply to an agent may carry."""
ADDED_BYTES = 1024
"""Room for what another replica adds to the head of a request: a head that is accepted there is accepted here."""
ADDED_HEADERS = 8
AFTERWARDS_S = 0.05
MAX_CALLERS = 16_384
# A heartbeat that cannot be answered synchronously. The forwarding replica then sends it again as a normal request.
NOT_AT_ONCE = b"HTTP/1.1 425 "
_NOT_AT_ONCE = NOT_AT_ONCE + b"Too Early\r\nContent-Length: 0\r\n\r\n"


class Note(Enum):
    """Kinds of notes, by the path of their request."""

    JOIN = "/join"  # sent first: proves with `Authorization` that the sender knows the members' secret
    WRITTEN = "/written"  # the whole reply was handed to the kernel
    UNWRITTEN = "/unwritten"  # the reply was not written, or the agent hung up before
    OPEN = "/open"  # its query: the owner's time up to which the agent's connection was certainly open
    NEXT = "/next"  # the agent sent its next request on the connection that carried the reply
    CLOSED_CLEANLY = "/closed/cleanly"  # the agent's connection ended by FIN, with everything acknowledged
    CLOSED = "/closed"  # the agent's connection ended in another way


def note(kind: Note, query: str = "", headers: str = "") -> bytes:
    """Encode a note."""
    # RFC 9112 §3.2: servers reject a request without Host
    return f"{METHOD} {kind.value}{query} HTTP/1.1\r\nHost: owner\r\n{headers}\r\n".encode("ascii")


def arrival(age_s: float, not_before: float | None) -> str:
    """Encode the arrival of a request. `not_before` is on the owner's clock, `None` if unknown."""
    bound = "" if not_before is None else f"{not_before:.6f}"
    return f"{max(0.0, age_s):.6f}&{bound}"


def read_arrival(value: str, now: float) -> tuple[float, float]:
    """Return the estimated arrival of a request and the earliest possible one, both on the owner's clock.

    Raises `ValueError` for a malformed or missing value.
    """
    age_s, _, bound = value.partition("&")
    age, not_before = float(age_s), float(bound) if bound else -math.inf
    if not (math.isfinite(age) and age >= 0) or math.isnan(not_before):
        raise ValueError("not a time")
    return now - age, min(not_before, now)


class PairedConnection(AgentConnection):
    """A connection of another replica.

    Its number is negative, because the positive numbers belong to agents' own connections.
    """

    head_limit_bytes = MAX_HEAD_BYTES + ADDED_BYTES
    remembers_heads = False  # every request passes `_begin_request`, which asks for the secret and takes the notes

    def __init__(self, secret: str, *args: Any) -> None:
        super().__init__(*args)
        self.number = -self.number
        self.operator = False
        self._joined = False
        self._heartbeats = False
        self._queued: deque[tuple[RawRequestMessage, StreamReader]] = deque()
        self._caller_of = lru_cache(MAX_CALLERS)(self._make_caller)
        self._secret = secret
        self._evidence = self._server_context.backends.evidence
        self._receipt: DeliveryReceipt | None = None  # of the newest reply, until a note says if it was written
        self._note_awaited = False  # about how the agent received the newest reply
        self._begun = False  # bytes of that reply were passed to this kernel

    def connection_made(self, transport: Any) -> None:
        """Drop the connection if the other replica does not join in time."""
        super().connection_made(transport)
        self._loop.call_later(self._server_context.listen.header_timeout_s, self._must_have_joined)

    def _must_have_joined(self) -> None:
        if not self._joined:
            self.abort()

    # --- incoming requests and notes ---

    def _read(self, data: bytes, since_s: float, *, waited: bool) -> None:
        if self._heartbeats:
            self._read_heartbeats(data)
        else:
            super()._read(data, since_s, waited=waited)

    def _read_heartbeats(self, data: bytes) -> None:
        """Answer all complete heartbeats with one write. No handler runs, so no request waits for the previous one."""
        try:
            messages = self._http.feed_data(data)[0]
            while messages:
                self._queued += messages
                for _ in messages:
                    self._http.message_consumed()
                messages = self._http.feed_data(b"")[0]  # the parser returns after some messages, with bytes left over
        except HttpProcessingError:
            self.abort()
            return
        now, replies = self._loop.time(), []
        while self._queued and self._queued[0][1].is_eof():
            context = RequestContext(self, *self._queued.popleft(), now, now)
            reply = self._handler.begin(context)
            if isinstance(reply, Reply) and not context.must_close:
                replies.append(self._handler.response(context, reply))
            else:
                context.answer = reply if isinstance(reply, Coroutine) else None
                self._handler.abandon(context)
                replies.append(_NOT_AT_ONCE)
        self._next_keepalive_close_time = now + self._keepalive_timeout
        if replies and self._wire is not None and not self._wire.is_closing():
            self._wire.write(b"".join(replies))

    def _begin_request(
        self, message: RawRequestMessage, body: StreamReader, arrived_s: float, earliest_s: float | None = None
    ) -> bool:
        if not self._joined:
            self._join(message)
        elif message.method == METHOD:
            self._take_note(message.path)
        else:
            return super()._begin_request(message, body, *self._arrival(message, arrived_s))
        self._http.message_consumed()
        return True

    def _arrival(self, message: RawRequestMessage, arrived_s: float) -> tuple[float, float]:
        """Return the arrival of a request at the other replica, as `read_arrival` does."""
        try:
            return read_arrival(message.headers.get(ARRIVAL_HEADER, ""), self._received_s)
        except ValueError:
            return arrived_s, -math.inf

    def _join(self, request: RawRequestMessage) -> None:
        """Authenticate the other replica by the cluster's secret; drop the connection if it is wrong."""
        path, _, purpose = request.path.partition("?")
        given = request.headers.get(hdrs.AUTHORIZATION, "").encode()
        is_join = request.method == METHOD and path == Note.JOIN.value
        self._joined = is_join and hmac.compare_digest(given, f"Bearer {self._secret}".encode())
        self._heartbeats = purpose == HEARTBEATS
        self.operator = purpose == OPERATOR
        if not self._joined:
            self.abort()

    def identify(self, authorization: str | None) -> Caller:
        """Return the caller of a forwarded request: the connection carries those of many agents.

        Raises `AgentError` 401.
        """
        return self._caller_of(authorization)

    def _make_caller(self, authorization: str | None) -> Caller:
        token = bearer(authorization)
        if token is None:
            raise AgentError(401, "the Authorization header is malformed")
        return Caller(token, self.number)

    def _take_note(self, path: str) -> None:
        """Handle a note about the latest reply. Notes about a reply that offered no commands are ignored."""
        evidence, receipt = self._evidence, self._receipt
        path, _, until = path.partition("?")
        match path:
            case Note.WRITTEN.value if receipt is not None:
                self._receipt, self._note_awaited = None, True
                evidence.written(receipt, unknown_open)
            case Note.UNWRITTEN.value if receipt is not None:
                self._receipt = None
                evidence.unwritten(receipt)
            case Note.OPEN.value if self._note_awaited:
                with suppress(ValueError):
                    if (until_s := float(until)) <= self._loop.time():  # neither NaN nor a time that is yet to come
                        evidence.connection_open(self.number, until_s)
            case Note.NEXT.value if self._note_awaited:
                self._note_awaited = False
                evidence.next_request(self.number)
            case Note.CLOSED.value | Note.CLOSED_CLEANLY.value if self._note_awaited:
                self._note_awaited = False
                evidence.connection_closed(self.number, path == Note.CLOSED_CLEANLY.value)

    # --- evidence that `AgentConnection` infers from its own agent, and that arrives as notes here ---

    def more_headers(self, receipt: DeliveryReceipt | None) -> dict[str, str]:
        """Return the owner's clock, and the mark of a reply that offers commands."""
        clock = {CLOCK_HEADER: f"{self._loop.time():.6f}"}
        return clock if receipt is None else clock | {RECEIPT_HEADER: "1"}

    def offer(self, receipt: DeliveryReceipt) -> None:
        """Await a note about the reply that is written next."""
        self._receipt, self._begun = receipt, False

    async def write(self, response: bytes, timeout_s: float) -> bool:
        """Write as `AgentConnection.write` does, and remember that the reply has begun."""
        self._begun = True
        return await super().write(response, timeout_s)

    def settle(self, receipt: DeliveryReceipt, *, written: bool) -> None:
        """Report a reply that was certainly not written. All other outcomes are reported by notes."""
        # Bytes that were passed to this kernel may have reached the agent, even if the connection failed afterwards.
        if not written and not self._begun and self._receipt is receipt:
            self._receipt = None
            self._evidence.unwritten(receipt)
        elif self._receipt is receipt and self._wire is None:
            self._report_unknown()

    async def await_peer_close(self) -> None:
        """Do nothing: the other replica sends a note about the reply."""

    def connection_lost(self, exc: BaseException | None) -> None:
        """Handle the notes that had arrived, then report that all other outcomes are unknown."""
        # Notes behind a request wait until the request is answered, which will not happen any longer: handle them now.
        for head in self._backlog.split(b"\r\n\r\n")[:-1]:
            method, _, rest = head.partition(b" ")
            if self._joined and method == METHOD.encode():
                self._take_note(rest.partition(b" ")[0].decode("latin-1"))
        super().connection_lost(exc)
        if self._receipt is not None or self._note_awaited:
            # Waiting polls of the same replica are cancelled in the same moment. The delay keeps uncertain commands
            # from being offered to them.
            self._loop.call_later(AFTERWARDS_S, self._report_unknown)

    def _report_unknown(self) -> None:
        """Report that it is unknown what the agent received of a reply without a last note."""
        receipt, self._receipt = self._receipt, None
        awaited, self._note_awaited = self._note_awaited, False
        if receipt is not None:
            self._evidence.written(receipt, unknown_open)
        if receipt is not None or awaited:
            self._evidence.connection_closed(self.number, None)


class _NoGuard(Guard):
    """A `Guard` without header checks, for requests that the other replica has checked."""

    def check(self, headers: Mapping[str, str]) -> None:
        """Accept all headers."""


class ClusterRequestHandler(RequestHandler):
    """Handler of the requests of other replicas.

    `owned(token)` returns True if this replica owns the token's shard. `operate` carries out an operator's request that
    another replica forwards.
    """

    def __init__(
        self, *args: Any, owned: Callable[[str], bool], operate: Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
    ) -> None:
        super().__init__(*args)
        self._owned = owned
        self._operate = operate
        self._is_elsewhere = self._reject_foreign

    def begin(self, request: RequestContext) -> Reply | Waiting | None:
        """Carry out an operator's action, or serve an agent's request as `RequestHandler.begin` does."""
        connection = cast("PairedConnection", request.connection)
        return self._carry_out(request) if connection.operator else super().begin(request)

    async def _carry_out(self, request: RequestContext) -> Answer:
        body = await read_body(request, self._listen.max_body_bytes, self._listen.body_timeout_s, self._budget)
        status, answer = await self._operate(request.message.path, body)
        return ProxyResponse(status, (("Content-Type", "application/json"),), answer)

    def _reject_foreign(self, token: str) -> bool:
        """Raise `AgentError` 421 for a shard of another replica: a forwarded request is never forwarded again."""
        if not self._owned(token):
            raise AgentError(MISDIRECTED, "this replica does not own the agent's link")
        return False


class ClusterListener(AgentServer):
    """The server for requests of other replicas. `owned` and `operate` are as in `ClusterRequestHandler`."""

    _section = "cluster"
    _line_limit_bytes = MAX_LINE_BYTES + ADDED_BYTES
    _max_headers = MAX_HEADERS + ADDED_HEADERS

    def __init__(
        self,
        *args: Any,
        context: ssl.SSLContext,
        secret: Callable[[], str],
        owned: Callable[[str], bool],
        operate: Callable[[str, bytes], Awaitable[tuple[int, bytes]]],
        **more: Any,
    ) -> None:
        self._context = context
        self._operate = operate
        self._secret = secret
        self._owned = owned
        super().__init__(*args, **more)

    def _make_guard(self) -> Guard:
        return _NoGuard(self._listen)

    def _make_handler(self, *args: Any) -> RequestHandler:
        return ClusterRequestHandler(*args, owned=self._owned, operate=self._operate)

    def _make_connection(self, *args: Any) -> AgentConnection:
        return PairedConnection(self._secret(), *args)

    def _make_connection_count(self, metrics: Metrics) -> ConnectionCount:
        return ConnectionCount()

    def _make_tls(self) -> ssl.SSLContext | None:
        return self._context
