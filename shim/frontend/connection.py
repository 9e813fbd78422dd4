"""One agent's TCP connection: arrival times, slow heads, and the evidence of delivery that its end gives."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from shim.frontend import kernel
from shim.frontend.gate import Gate
from shim.frontend.house import House
from shim.frontend.refused import NO_ROUTE
from shim.frontend.replies import SENT_CLOSE
from shim.ports import Client

FAREWELL_S = 2.0

Express = Callable[["Connection", RawRequestMessage, StreamReader, float], bytes | None]
"""Makes the whole response to a request at once, or `None`; the number is the loop time of its first byte."""

logger = logging.getLogger(__name__)


class Connection(RequestHandler):
    """aiohttp's protocol for one connection, with what it does not tell. `client` is who called last."""

    __slots__ = (
        "_aborted",
        "_acknowledged",
        "_answered",
        "_arrivals_s",
        "_body",
        "_express",
        "_had_lease",
        "_head_since_s",
        "_head_timed",
        "_head_timer",
        "_house",
        "_lease_open",
        "_own_socket",
        "_pipelined",
        "_refused",
        "_socket",
        "_wire",
        "authorization",
        "client",
        "number",
    )

    def __init__(
        self, server: web.Server, house: House, express: Express, number: int, options: dict[str, Any]
    ) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.number = number
        self.client: Client | None = None
        self.authorization: str | None = None
        self._express = express
        self._parser = cast("Any", Gate(self._parser, self))
        self._house = house
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its `transport` before the end
        self._socket: socket.socket | None = None  # or what transports give instead, which knows the same methods
        self._own_socket: socket.socket | None = None
        self._refused = False
        self._arrivals_s: tuple[float, ...] = ()
        self._head_since_s: float | None = None
        self._head_timed = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._body: StreamReader | None = None
        self._answered = 0
        self._pipelined = False
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
        self._house.doors.open += 1
        self._house.metrics.connections.inc()
        if self._house.doors.open > self._house.listen.max_connections:
            self._refused = True
            self._house.metrics.bad_requests.labels("connections").inc()
            wire.write(self._refusal(503, "too many connections"))
            wire.close()
            return
        # Writing pauses when the kernel does not take a reply whole, so that "written" means handed to the kernel.
        # asyncio's TLS compares with >=, and 0 would pause it for ever.
        wire.set_write_buffer_limits(high=1 if tls else 0, low=0)
        super().connection_made(transport)
        # Clients may connect before they have something to say; one that never speaks must not take a place for ever.
        self._head_timer = self._loop.call_later(self._house.listen.keepalive_s, self._never_spoke)

    def eof_received(self) -> None:
        self._note_acknowledgement()  # TLS is going to answer with bytes of its own, which nobody will acknowledge

    def connection_lost(self, exc: BaseException | None) -> None:
        self._house.doors.open -= 1
        self._house.metrics.connections.dec()
        self._stop_head_timer()
        self._note_acknowledgement()
        if self._own_socket is not None:
            self._own_socket.close()
        self._wire = self._socket = None  # the file descriptor may soon be another connection's
        if self._refused:
            return
        super().connection_lost(exc)
        if self._had_lease:
            self._house.switchboard.connection_closed(self.number, exc is None and self._acknowledged)

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
            self._acknowledged = not wire.get_write_buffer_size() and kernel.acknowledged(sock)

    def now_s(self) -> float:
        """The event loop's time."""
        return self._loop.time()

    # --- requests ---

    @property
    def closing(self) -> bool:
        """True when the next reply is the last."""
        return self._close or self._force_close

    def data_received(self, data: bytes) -> None:
        # also called without data, for what the parser held back
        if self._close or self._force_close:
            return
        before = self._request_count
        # RFC 9112 §2.2: an empty line before a request is not its beginning
        if data and self._head_since_s is None and not self._in_body() and data != b"\r\n":
            self._head_since_s = self._loop.time()
            # A request sent before the last one was answered is no sign that its sender has read anything.
            self._pipelined = self._pipelined or before > self._answered
        super().data_received(data)
        if self._request_count > before:
            self._heads_complete(self._request_count - before)
        elif self._head_since_s is not None and not self._head_timed:
            self._head_timed = True
            if self._head_timer is not None:
                self._head_timer.cancel()
            timeout_s = self._house.listen.header_timeout_s
            self._head_timer = self._loop.call_later(timeout_s, self._head_too_slow)

    def _in_body(self) -> bool:
        return self._body is not None and not self._body.is_eof()

    def _heads_complete(self, arrived: int) -> None:
        self._arrivals_s += (self._loop.time() if self._head_since_s is None else self._head_since_s,)
        if arrived > 1:
            self._arrivals_s += (self._loop.time(),) * (arrived - 1)
        self._head_since_s = None
        self._stop_head_timer()
        message, payload = self._messages[-1]
        if self._body is not None and self._in_body() and isinstance(fault := getattr(message, "exc", None), Exception):
            # aiohttp queues a fault in a body as if it were a request of its own, and the body's reader waits on
            self._body.set_exception(fault)
        self._body = payload
        self._pipelined = self._pipelined or self._request_count - self._answered > 1

    def answered_at_once(self, request: RawRequestMessage, body: StreamReader) -> bool:
        """Answer a request that has just been parsed, if nothing else is under way and nothing of it needs to wait."""
        waiter, wire = self._waiter, self._wire
        if waiter is None or waiter.done() or self._messages or self._pipelined or self.writing_paused:
            return False
        if wire is None or wire.is_closing() or self._head_since_s is None:
            return False
        if request.should_close or request.upgrade or not body.is_eof() or body.exception() is not None:
            return False
        self._note_next_request()
        response = self._express(self, request, body, self._head_since_s)
        if response is None:
            return False
        self._head_since_s = None
        self._stop_head_timer()
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        wire.write(response)
        return True

    def _stop_head_timer(self) -> None:
        self._head_timed = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _never_spoke(self) -> None:
        self._head_timer = None
        self.force_close()

    def _head_too_slow(self) -> None:
        self._head_timer = None
        self._house.metrics.bad_requests.labels("head").inc()
        if self._request_count > self._answered:
            self.close()  # an earlier request is being served and gets its answer
            return
        if self._wire is not None:
            self._wire.write(self._refusal(408, "the request did not arrive in time"))
        self.force_close()

    def _refusal(self, status: int, error: str) -> bytes:
        """Return the response to what is refused before its route is known, and note it."""
        self._house.refused.note(self._loop.time(), status, NO_ROUTE, error)
        return self._house.replies.error(status, error)

    def begin_request(self) -> float:
        """Called once by the handler of each request; returns the loop time of its first byte."""
        self._note_next_request()
        arrived_s = self._arrivals_s[0] if self._arrivals_s else self._loop.time()
        self._arrivals_s = self._arrivals_s[1:]
        return arrived_s

    def _note_next_request(self) -> None:
        if self._lease_open and not self._pipelined:
            self._lease_open = False
            self._house.switchboard.next_request(self.number)

    def can_write(self, *, for_commands: bool) -> bool:
        """False when the agent is known to have hung up; for a reply with commands the kernel is asked, too."""
        wire, sock = self._wire, self._socket
        if wire is None or sock is None or wire.is_closing() or self.transport is None:
            return False
        return not (for_commands and kernel.hung_up(sock))

    async def write(self, response: bytes, timeout_s: float, *, answered: bool = True) -> bool:
        """Hand a response to the kernel, or a further piece of one (`answered=False`).

        False: it could not be, and the connection is as good as gone.
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
        self._answered += answered
        return not wire.is_closing()

    def lease_written(self) -> None:
        """The response that was just written offers commands: how the connection goes on is evidence."""
        self._lease_open = self._had_lease = True

    async def part(self) -> None:
        """After a last reply with commands: wait a moment for the agent to close, which tells that it has read it."""
        wire = self._wire
        if wire is None or wire.is_closing():
            return
        if wire.can_write_eof():
            wire.write_eof()
        await asyncio.sleep(FAREWELL_S)  # cut short: when the agent closes, aiohttp cancels the handler

    def dismiss(self, *, linger: bool) -> None:
        """Say whether aiohttp shall read and throw away what is left of a body before it closes the connection."""
        if not linger:
            self._lingering_time = 0.0

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what the HTTP parser refused: aiohttp would answer in text and echo the input, also to the log."""
        if not isinstance(exc, HttpProcessingError):
            self._house.metrics.internal_errors.labels("frontend").inc()
            logger.error("a handler failed after its reply", exc_info=exc)
            return SENT_CLOSE
        self._house.metrics.bad_requests.labels("http").inc()
        logger.debug("a malformed request: %s", type(exc).__name__)
        too_long = isinstance(exc, LineTooLong)
        text = "a line of the request is too long" if too_long else "malformed request"
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(self._refusal(431 if too_long else 400, text))
        return SENT_CLOSE
