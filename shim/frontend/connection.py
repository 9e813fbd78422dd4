"""One agent's TCP connection: requests one at a time, bounds on what waits, and the evidence of delivery at its end.

aiohttp's own protocol parses whatever has arrived. Here the parser gets one request at a time: what a peer sends behind
an unanswered request stays as bytes, is bounded, and stops the reading (docs/threat-model.md#bounds). That also tells
exactly when the first byte of a request came, which is what evidence rests on
(docs/reference/protocol.md#3-commands, DELIVERED).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from shim.core.bounds import FREE_BYTES, MAX_EMPTY_LINES, MAX_HEAD_BYTES, MAX_WAITING_BYTES
from shim.frontend import kernel
from shim.frontend.house import House
from shim.frontend.refused import NO_ROUTE
from shim.frontend.replies import SENT_CLOSE
from shim.ports import Client, Lease, Pending

FAREWELL_S = 2.0
LINGER_S = 2.0
CHUNKED = -1

Express = Callable[["Connection", RawRequestMessage, StreamReader, float], bytes | Pending | None]
"""Makes the whole response to a request at once, or `None`; the number is the loop time of its first byte.

`Pending`: another replica makes it; `answer_late` follows.
"""

logger = logging.getLogger(__name__)


class EmptyLine:
    """Finds the next empty line in bytes that come in pieces: no head and no chunked body ends anywhere else."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def find(self, data: bytes) -> int:
        """Return how many bytes of `data` go up to the end of the next empty line, 0 if there is none yet."""
        seen = self._tail + data
        at = seen.find(b"\r\n\r\n")
        if at < 0:
            self._tail = seen[-3:]
            return 0
        end = at + 4 - len(self._tail)
        self._tail = b""
        return end


class Connection(RequestHandler):
    """aiohttp's protocol for one connection, with what it does not tell. `client` is who called last."""

    __slots__ = (
        "_aborted",
        "_acknowledged",
        "_arrived_s",
        "_backlog",
        "_backlog_since_s",
        "_body",
        "_body_left",
        "_charged_bytes",
        "_empty_line",
        "_empty_lines",
        "_entered",
        "_express",
        "_had_lease",
        "_head_bytes",
        "_head_since_s",
        "_head_timer",
        "_house",
        "_http",
        "_lease_open",
        "_open",
        "_own_socket",
        "_pending",
        "_pipelined",
        "_raw",
        "_refused",
        "_socket",
        "_turned_away",
        "_unread_since_s",
        "_wire",
        "authorization",
        "client",
        "lost",
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
        self._http: Any = self._parser
        self._house = house
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its `transport` before the end
        self._socket: socket.socket | None = None  # or what transports give instead, which knows the same methods
        self._own_socket: socket.socket | None = None
        self._entered = False
        self._refused = False
        self.lost = False
        self._turned_away = False
        self._open = False  # a request is with the handler, which has not answered it yet
        self._arrived_s = 0.0
        self._head_since_s: float | None = None
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._empty_line = EmptyLine()
        self._empty_lines = 0
        self._body: StreamReader = EMPTY_PAYLOAD
        self._body_left = 0  # bytes that are still to come, or `CHUNKED`
        self._backlog = b""
        self._backlog_since_s = 0.0
        self._unread_since_s: float | None = None  # when bytes were seen in the kernel that were not read yet
        self._charged_bytes = 0
        self._pipelined = False
        self._pending: Pending | None = None
        self._raw = b""
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
        self._head_timer = self._loop.call_later(self._house.listen.keepalive_s, self._never_spoke)
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
        self._stop_head_timer()
        self._backlog = b""
        self._head_bytes = 0
        self._charge()
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
            self._acknowledged = not wire.get_write_buffer_size() and kernel.acknowledged(sock)

    def now_s(self) -> float:
        """The event loop's time."""
        return self._loop.time()

    # --- requests ---

    @property
    def closing(self) -> bool:
        """True when the next reply is the last."""
        return self._close or self._force_close

    @property
    def _must_wait(self) -> bool:
        """True while nothing more may be parsed: a request is whole and unanswered, or its body's reader is full."""
        return self._reading_paused or (self._open and not self._body_left) or self._wire is None

    def data_received(self, data: bytes) -> None:
        if self._close or self._force_close or self._turned_away:
            return
        if self._payload_parser is not None:
            super().data_received(data)  # the connection has become a WebSocket
        elif not data:
            if not self._body.is_eof():
                self._feed_body(b"")  # the body's reader has room for what the parser held back
            self._read_on()
        elif self._backlog or self._must_wait:
            self._keep(data, self._loop.time())
        else:
            self._read(data, self._loop.time(), waited=False)

    def set_parser(self, parser: Any, data_received_cb: Callable[[], None] | None = None) -> None:
        """Become a WebSocket: what waited behind the handshake are its first frames."""
        super().set_parser(parser, data_received_cb)
        data, self._backlog = self._backlog, b""
        self._charge()
        if data:
            super().data_received(data)
        if self._buffer_paused:
            self._resume_reading_for_buffer()

    def _resume_reading_if_drained(self) -> None:
        """Leave the reading to `request_over`: aiohttp would go on as soon as a handler has begun."""

    def _read(self, data: bytes, since_s: float, *, waited: bool) -> None:
        """Parse up to the end of the current request and keep the rest; `waited`: it was kept before."""
        while data and not (self._close or self._force_close or self._turned_away):
            if self._must_wait:
                self._keep(data, since_s)
                return
            if self._body_left:
                size = self._size_in_body(data)
                self._feed_body(data[:size])
                data = data[size:]
            else:
                data = self._read_head(data, since_s, waited=waited)
        self._charge()

    def _keep(self, data: bytes, since_s: float) -> None:
        """Hold bytes back until the request before them is answered; beyond a bound no more are read."""
        if not self._backlog:
            self._backlog_since_s = since_s
            if self._open and self._head_timer is None:
                self._head_timer = self._loop.call_later(self._house.listen.header_timeout_s, self._head_too_slow)
        self._backlog += data
        if len(self._backlog) >= MAX_WAITING_BYTES and not self._buffer_paused:
            self._pause_reading_for_buffer()
        self._charge()

    def _read_on(self) -> None:
        """Go on with what was kept."""
        data, self._backlog = self._backlog, b""
        if data:
            self._read(data, self._backlog_since_s, waited=True)
        self._charge()
        if self._buffer_paused and len(self._backlog) < MAX_WAITING_BYTES:
            self._resume_reading_for_buffer()

    def _charge(self) -> None:
        """Take what is held beyond a small allowance from the budget of all connections together."""
        held_bytes = max(0, len(self._backlog) + self._head_bytes - FREE_BYTES)
        if held_bytes <= self._charged_bytes:
            self._house.budget.give_back(self._charged_bytes - held_bytes)
        elif not self._house.budget.take(held_bytes - self._charged_bytes):
            self._out_of_memory()
            return
        self._charged_bytes = held_bytes

    def _out_of_memory(self) -> None:
        if not self._open:
            self._turn_away(503, "too many large requests at a time", "memory", "Retry-After: 1\r\n")
            return
        self._house.metrics.bad_requests.labels("memory").inc()
        self._backlog = b""
        self.close()  # the request under way gets its answer, what was sent behind it gets none
        self._charge()

    # --- heads ---

    def _read_head(self, data: bytes, since_s: float, *, waited: bool) -> bytes:
        """Parse a head, or a piece of one; returns what comes behind its request."""
        if self._head_since_s is None:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2: an empty line before a request is not its beginning
            if not data:
                return b""
            self._begin_head(since_s, waited=waited)
            self._raw = data
        else:
            self._raw = b""
        end = self._empty_line.find(data)
        piece, rest = (data[:end], data[end:]) if end else (data, b"")
        self._head_bytes += len(piece)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._turn_away(431, "the head of the request is too large", "head")
            return b""
        try:
            messages, upgraded, _ = self._http.feed_data(piece)
        except HttpProcessingError as fault:
            self._malformed(fault)
            return b""
        if not messages:
            return rest
        if len(messages) > 1:  # the parser sees requests where no head ends: nothing of it can be trusted
            self._turn_away(400, "malformed request", "http")
            return b""
        return self._begin_body(*messages[0], upgraded=upgraded, rest=rest)

    def _begin_head(self, since_s: float, *, waited: bool) -> None:
        self._head_since_s = since_s if self._unread_since_s is None else min(since_s, self._unread_since_s)
        self._unread_since_s = None
        # A request that began before the last one was answered is no sign that its sender has read anything.
        self._pipelined = self._pipelined or waited
        self._stop_head_timer()
        self._head_timer = self._loop.call_later(self._house.listen.header_timeout_s, self._head_too_slow)

    def _begin_body(self, message: RawRequestMessage, body: StreamReader, *, upgraded: bool, rest: bytes) -> bytes:
        """Take a request whose head is whole, with as much of its body as is here; returns what comes behind it."""
        arrived_s = self._loop.time() if self._head_since_s is None else self._head_since_s
        self._head_since_s = None
        self._head_bytes = 0
        self._stop_head_timer()
        self._body, self._empty_lines = body, 0
        if message.method == hdrs.METH_CONNECT:
            self._body_left = 0
        else:
            self._body_left = CHUNKED if message.chunked else int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
        self._upgraded = upgraded
        self._open = True
        if rest and self._body_left:
            size = self._size_in_body(rest)
            self._feed_body(rest[:size])
            rest = rest[size:]
        self._raw = b"" if self._body_left else self._raw[: len(self._raw) - len(rest)]
        if self._answered_at_once(message, body, arrived_s):
            self._open = self._pending is not None
        else:
            self._arrived_s = arrived_s
            self._request_count += 1
            self._messages.append((message, body))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        return rest

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
        self.request_over()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _never_spoke(self) -> None:
        self._head_timer = None
        self.force_close()

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self._open:
            if b"\r\n\r\n" not in self._backlog:
                self._house.metrics.bad_requests.labels("head").inc()
                self.close()  # an earlier request is being served and gets its answer
            return
        self._turn_away(408, "the request did not arrive in time", "head")

    def _malformed(self, fault: HttpProcessingError) -> None:
        """Answer what the parser refused in our own words: its own echo the input, also to the log."""
        logger.debug("a malformed request: %s", type(fault).__name__)
        if isinstance(fault, LineTooLong):
            self._turn_away(431, "a line of the request is too long", "http")
        else:
            self._turn_away(400, "malformed request", "http")

    def _turn_away(self, status: int, text: str, reason: str, more: str = "") -> None:
        """Answer what never becomes a call, and close."""
        self._house.metrics.bad_requests.labels(reason).inc()
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(self._refusal(status, text, more))
        self.end_after_reply()

    def end_after_reply(self) -> None:
        """Close after a last reply, but throw away for a moment what still comes: a reset would destroy the reply."""
        self._turned_away = True
        self._backlog = b""
        self._head_bytes = 0
        self._charge()
        self._stop_head_timer()
        if not self._body.is_eof():
            self._body.feed_eof()  # else aiohttp would read on
        wire = self._wire
        if wire is not None and not wire.is_closing():
            if wire.can_write_eof():
                wire.write_eof()
            self._head_timer = self._loop.call_later(LINGER_S, self.force_close)

    def _refusal(self, status: int, error: str, more: str = "") -> bytes:
        """Return the response to what is refused before its route is known, and note it."""
        self._house.refused.note(self._loop.time(), status, NO_ROUTE, error)
        return self._house.replies.error(status, error, more=more)

    # --- bodies ---

    def _size_in_body(self, data: bytes) -> int:
        """Return how many bytes of `data` the parser may have now; all of them belong to the current body."""
        if self._body_left != CHUNKED:
            size = min(len(data), self._body_left)
            self._body_left -= size
            return size
        self._empty_lines += 1
        return self._empty_line.find(data) or len(data)

    def _feed_body(self, data: bytes) -> None:
        fault: Exception | None = None
        messages: Any = ()
        try:
            messages, self._upgraded, _ = self._http.feed_data(data)
        except HttpProcessingError as error:
            fault = error
        body = self._body
        if self._empty_lines > MAX_EMPTY_LINES or (fault is None and messages):
            fault = RequestPayloadError("the body cannot be read")
        if body.exception() is not None or fault is not None:
            self._body_left = 0
            if not self._open:
                self.force_close()  # its reply has been written, and nobody reads the rest
            elif fault is not None and body.exception() is None:
                body.set_exception(fault)
        elif self._body_left == CHUNKED and body.is_eof():
            self._body_left = 0

    # --- the handler's side ---

    def begin_request(self) -> float:
        """Called once by the handler of each request; returns the loop time of its first byte."""
        self._note_next_request()
        return self._arrived_s

    def request_over(self) -> None:
        """Called once by the handler when its request is answered: go on with what waits behind it."""
        self._open = False
        if self._upgraded and self._payload_parser is None:
            self._upgraded = False  # the upgrade was declined
            self._http.set_upgraded(False)
        if self._parser is not None and not (self._close or self._force_close):
            self._stop_head_timer()
            self._read_on()

    def _note_next_request(self) -> None:
        if self._lease_open and not self._pipelined:
            self._lease_open = False
            self._house.switchboard.next_request(self.number)

    def can_write(self, *, for_commands: bool) -> bool:
        """False when the agent is known to have hung up; for a reply with commands the kernel is asked, too."""
        wire, sock = self._wire, self._socket
        if wire is None or sock is None or wire.is_closing() or self.transport is None:
            return False
        if for_commands and kernel.unread(sock):
            # What the agent has sent already is no sign that it has read what is going to be written.
            self._pipelined = True
            self._unread_since_s = self._loop.time()
        return not (for_commands and kernel.hung_up(sock))

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

    def offer(self, lease: Lease) -> None:
        """Note that the response that is about to be written offers commands."""

    def settle(self, lease: Lease, *, written: bool) -> None:
        """Tell what became of the response: once it is written, how the connection goes on is evidence."""
        if written:
            self._lease_open = self._had_lease = True
            self._house.switchboard.written(lease)
        else:
            self._house.switchboard.unwritten(lease)

    def remarks(self, lease: Lease | None) -> Mapping[str, str]:
        """Return further headers for a reply."""
        return {}

    def arrival(self, started_s: float) -> tuple[float, float]:
        """Return when the request arrived, and the moment before which it certainly did not."""
        return started_s, started_s

    async def part(self) -> None:
        """After a last reply with commands: wait a moment for the agent to close, which tells that it has read it."""
        wire = self._wire
        if wire is None or wire.is_closing():
            return
        if wire.can_write_eof():
            wire.write_eof()
        await asyncio.sleep(FAREWELL_S)  # cut short: when the agent closes, aiohttp cancels the handler

    def log_exception(self, *args: Any, **details: Any) -> None:
        """Log what aiohttp could not cope with, except for what came behind an answer and is thrown away anyway."""
        if self._open:
            super().log_exception(*args, **details)

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
