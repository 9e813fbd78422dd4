"""One connection of an agent, on top of aiohttp's protocol: bounds, evidence of delivery, how it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from prometheus_client import Gauge

from shim.agent_api import tcp_state
from shim.agent_api.refused_calls import NO_ROUTE, RefusedCalls
from shim.agent_api.responses import SENT_CLOSE, ResponseBuilder
from shim.config.settings import Listen
from shim.core.agent_calls import AgentCall, PollCall
from shim.http_connection import Budget, HttpConnection
from shim.metrics import Metrics
from shim.ports import AgentService, Caller, DeliveryReceipt, Pending
from shim.protocol.dialects import Match


@dataclass(slots=True)
class ConnectionCount:
    """Counts the connections that are open, also in a gauge where one is given."""

    gauge: Gauge | None = None
    open: int = 0

    def entered(self) -> None:
        """Count a connection in."""
        self.open += 1
        if self.gauge is not None:
            self.gauge.inc()

    def left(self) -> None:
        """Count it out."""
        self.open -= 1
        if self.gauge is not None:
            self.gauge.dec()


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What all connections of one frontend share."""

    listen: Listen
    switchboard: AgentService
    metrics: Metrics
    replies: ResponseBuilder
    budget: Budget
    refused: RefusedCalls
    doors: ConnectionCount = field(default_factory=ConnectionCount)


FAREWELL_S = 2.0

SyncHandler = Callable[["AgentConnection", RawRequestMessage, StreamReader, float], bytes | Pending | None]
"""Makes the whole response to a request at once, or `None`; the number is the loop time of its first byte.

`Pending`: another replica makes it; `answer_late` follows.
"""

logger = logging.getLogger(__name__)


class AgentConnection(HttpConnection):
    """One agent's connection. `client` is who called last."""

    __slots__ = (
        "_aborted",
        "_acknowledged",
        "_entered",
        "_express",
        "_had_lease",
        "_house",
        "_lease_open",
        "_own_socket",
        "_refused",
        "_socket",
        "authorization",
        "client",
        "lost",
        "number",
    )

    def __init__(
        self, server: web.Server, house: ServerContext, express: SyncHandler, number: int, options: dict[str, Any]
    ) -> None:
        super().__init__(server, house.budget, house.listen.header_timeout_s, options)
        self.number = number
        self.client: Caller | None = None
        self.authorization: str | None = None
        self._express = express
        self._house = house
        self._socket: socket.socket | None = None  # or what transports give instead, which knows the same methods
        self._own_socket: socket.socket | None = None
        self._entered = False
        self._refused = False
        self.lost = False
        self._lease_open = False
        self._had_lease = False
        self._acknowledged = False
        self._aborted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = wire = cast("asyncio.Transport", transport)
        tls = wire.get_extra_info("sslcontext") is not None
        self._socket = wire.get_extra_info("socket")
        if tls:
            # the transport's own is closed before `connection_lost` comes
            self._socket = self._own_socket = self._socket.dup()
        if not self._entered and not self.enter():
            self._refused = True
            wire.write(self._refusal(503, "too many connections"))
            wire.close()
            return
        # Writing pauses when the kernel does not take a reply whole, so that "written" means handed to the kernel.
        # asyncio's TLS compares with >=, and 0 would pause it for ever.
        wire.set_write_buffer_limits(high=1 if tls else 0, low=0)
        super().connection_made(transport)
        # Clients may connect before they have something to say; one that never speaks must not take a place for ever.
        self._watch_for_first_request(self._house.listen.keepalive_s)
        self._read_on()  # a TLS client may send its request with the end of its handshake

    def enter(self) -> bool:
        """Count the connection in, when it is accepted; false if there are too many."""
        self._entered = True
        self._house.doors.entered()
        if self._house.doors.open <= self._house.listen.max_connections:
            return True
        self._house.metrics.bad_requests.labels("connections").inc()
        return False

    def leave(self) -> None:
        """Count the connection out; also called for one whose TLS handshake came to nothing. Idempotent."""
        if self._entered:
            self._entered = False
            self._house.doors.left()

    def eof_received(self) -> None:
        self._note_acknowledgement()  # TLS is going to answer with bytes of its own, which nobody will acknowledge

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True
        self.leave()
        self._drop_what_is_held()
        self._note_acknowledgement()
        if self._own_socket is not None:
            self._own_socket.close()
        self._wire = self._socket = None  # the file descriptor may soon be another connection's
        if self._refused:
            return
        super().connection_lost(exc)
        if self._pending is not None:
            self._pending.forget()
        if self._had_lease:
            self._end_lease(exc is None and self._acknowledged)

    def _end_lease(self, clean: bool) -> None:
        self._house.switchboard.connection_closed(self.number, clean)

    def force_close(self) -> None:
        self._note_acknowledgement()
        super().force_close()

    def abort(self) -> None:
        """Drop the connection with everything unsent."""
        self._aborted = True
        if self._wire is not None:
            self._wire.abort()

    def _note_acknowledgement(self) -> None:
        wire, sock = self._wire, self._socket
        if self._had_lease and not self._acknowledged and not self._aborted and wire is not None and sock is not None:
            self._acknowledged = not wire.get_write_buffer_size() and tcp_state.acknowledged(sock)

    def _answered_at_once(self, request: RawRequestMessage, body: StreamReader, arrived_s: float) -> bool:
        """Answer a request that has just been parsed, if nothing else is under way and nothing of it needs to wait."""
        waiter, wire = self._waiter, self._wire
        if waiter is None or waiter.done() or self._messages or self._pipelined or self.writing_paused:
            return False
        if wire is None or wire.is_closing():
            return False
        if request.should_close or request.upgrade or not body.is_eof() or body.exception() is not None:
            return False
        self._note_next_request()
        response = self._express(self, request, body, arrived_s)
        if response is None:
            return False
        self._http.message_consumed()
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if isinstance(response, bytes):
            wire.write(response)
        else:
            self._pending = response
        return True

    @property
    def raw_request(self) -> bytes:
        """Return the bytes of the request that is being answered at once, empty where they came in pieces."""
        return self._raw

    def answer_late(self, response: bytes) -> None:
        """Answer a request that another replica was asked for."""
        self._pending = None
        if self._wire is not None and not self._wire.is_closing():
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            self._wire.write(response)
        self._request_over()

    def _refusal(self, status: int, error: str, more: str = "") -> bytes:
        """Return the response to what is refused before its route is known, and note it."""
        self._house.refused.note(self._loop.time(), status, NO_ROUTE, error)
        return self._house.replies.error(status, error, more=more)

    def _count_refused(self, reason: str) -> None:
        self._house.metrics.bad_requests.labels(reason).inc()

    def begin_request(self) -> float:
        """Called once by the handler of each request; returns the loop time of its first byte."""
        self._note_next_request()
        self._unread_bytes = 0
        self._charge()
        return self._arrived_s

    def _note_next_request(self) -> None:
        if self._lease_open and not self._pipelined:
            self._lease_open = False
            self._house.switchboard.next_request(self.number)

    def peer_can_receive(self, *, for_commands: bool) -> bool:
        """False when the agent is known to have hung up; for a reply with commands the kernel is asked, too."""
        wire, sock = self._wire, self._socket
        if wire is None or sock is None or wire.is_closing() or self.transport is None:
            return False
        if for_commands and tcp_state.unread(sock):
            # What the agent has sent already is no sign that it has read what is going to be written.
            self._pipelined = True
            self._unread_since_s = self._loop.time()
        return not (for_commands and tcp_state.hung_up(sock))

    async def write(self, response: bytes, timeout_s: float) -> bool:
        """Hand a response, or a piece of one, to the kernel; false if it was not taken: the connection is lost."""
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

    def offer(self, lease: DeliveryReceipt) -> None:
        """Note that the response that is about to be written offers commands."""

    def settle(self, lease: DeliveryReceipt, *, written: bool) -> None:
        """Tell what became of the response: once it is written, how the connection goes on is evidence."""
        if written:
            self._lease_open = self._had_lease = True
            self._house.switchboard.written(lease)
        else:
            self._house.switchboard.unwritten(lease)

    def remarks(self, lease: DeliveryReceipt | None) -> Mapping[str, str]:
        """Return further headers for a reply."""
        return {}

    def arrival(self, started_s: float) -> tuple[float, float]:
        """Return when the request arrived, and the moment before which it certainly did not."""
        return started_s, started_s

    async def await_peer_close(self) -> None:
        """After a last reply with commands: wait a moment for the agent to close, which tells that it has read it."""
        wire = self._wire
        if wire is None or wire.is_closing():
            return
        if wire.can_write_eof():
            wire.write_eof()
        await asyncio.sleep(FAREWELL_S)  # cut short: when the agent closes, aiohttp cancels the handler

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """End a connection whose handler failed: aiohttp would write a second response, in text."""
        self._house.metrics.internal_errors.labels("frontend").inc()
        logger.error("a handler failed after its reply", exc_info=exc)
        return SENT_CLOSE


class RequestContext:
    """One request on its way through; `step` is where it is, in words of the metric `bad_requests`.

    `arrived_s` is a moment before which it did not arrive. `body` was read already, to be sent to another replica.
    """

    __slots__ = (
        "arrived_s",
        "body",
        "connection",
        "lease",
        "match",
        "more",
        "must_close",
        "request",
        "session",
        "started_s",
        "step",
    )

    def __init__(self, request: web.BaseRequest) -> None:
        self.request = request
        self.connection = cast("AgentConnection", request.protocol)
        self.started_s, self.arrived_s = self.connection.arrival(self.connection.begin_request())
        self.body: bytes | None = None
        self.match: Match | None = None
        self.lease: DeliveryReceipt | None = None
        self.session: tuple[str, str] | None = None  # whose request it is, once it is counted among those in flight
        self.step = "guard"
        self.more = ""
        self.must_close = False

    def moment(self, call: AgentCall) -> float:
        """Return what the switchboard reckons a call's time from: a poll's evidence must not be older than it is."""
        return self.arrived_s if isinstance(call, PollCall) else self.started_s

    @property
    def place(self) -> tuple[str, str]:
        """Dialect and operation, empty where no route matched."""
        match = self.match
        return ("", "") if match is None else (match.dialect.NAME, match.route.operation)
